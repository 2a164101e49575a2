"""What the Triton models share that hand requests to an engine core: start, requests in, answers out, end."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from pageflight.backend import triton
from pageflight.backend.answer import Answer, AnswerForm, Reply
from pageflight.backend.cancellation import CancellationWatch
from pageflight.backend.descriptors import close_inherited_sockets
from pageflight.backend.generations import GenerationBuilder, TokenWishes
from pageflight.backend.inputs import Row, add_timeout, parameters_of, rows_of
from pageflight.backend.ledger import Ledger
from pageflight.backend.options import Options
from pageflight.backend.settings import ModelSettings
from pageflight.backend.shutdown import Shutdown
from pageflight.core import wire
from pageflight.core.config import SessionAffinity
from pageflight.core.errors import ConfigError, InvalidArgument, PageflightError, Unsupported
from pageflight.core.manifest import EngineManifest
from pageflight.loop.address import CoreAddress, instance_address
from pageflight.loop.open_sequence import Generation
from pageflight.loop.router import Router, Routing
from pageflight.obs.core_metrics import CoreMetrics
from pageflight.obs.metrics import MetricsFlusher, RequestMetrics, ServingObserver
from pageflight.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FIRST_READY_S = 60.0

_ENSEMBLE_SPELLINGS = {engine: ensemble for ensemble, engine in wire.ENSEMBLE_TO_ENGINE.items()}
_ENSEMBLE_PROMPT = wire.ENSEMBLE_INPUTS[0].name


def read_settings(args: Mapping[str, str]) -> ModelSettings:
    """The instance's settings; its log lines go to the server's log."""
    close_inherited_sockets()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    return ModelSettings.read(args)


def core_addresses(settings: ModelSettings, engine_model: str, num_instances: int) -> tuple[CoreAddress, ...]:
    """Where every model of a checkpoint meets the cores of its engine model."""
    return tuple(
        instance_address(settings.repository, engine_model, instance, server_pid=settings.server_pid)
        for instance in range(num_instances)
    )


def routing_of(settings: ModelSettings, num_instances: int) -> Routing:
    """How this instance spreads requests over so many cores. Raises ConfigError."""
    reroute_after_s = settings.real("reroute_after_s")
    if not 0 <= reroute_after_s < float("inf"):
        raise ConfigError(f"config.pbtxt of {settings.name}: reroute_after_s={reroute_after_s}: must be at least 0")
    return Routing(
        home=settings.instance % num_instances,
        session_affinity=cast(SessionAffinity, settings.choice("session_affinity", get_args(SessionAffinity))),
        reroute_after_s=reroute_after_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of a request, checked and ready to be submitted."""

    generation: Generation
    answer: Answer
    spellings: Mapping[str, str]
    """What the client calls the options, by the names that later checks give them."""


def as_spelt(error: InvalidArgument, spellings: Mapping[str, str]) -> InvalidArgument:
    """The same error about the option as the client calls it."""
    return type(error)(spellings.get(error.option, error.option), error.value, error.limit)


def check_token_ids(options: Options, vocab_size: int) -> None:
    """The ids at which to end, under their own names: later checks know them as one list. Raises InvalidArgument."""
    for name, ids in (("end_id", (options.get("end_id", -1),)), ("stop_token_ids", options.get("stop_token_ids", ()))):
        outside = [index for index in ids if index >= vocab_size]
        if outside:
            minimum = wire.OPTIONS[name].minimum or 0
            raise InvalidArgument(name, outside[0], f"token ids must be {minimum:g} to {vocab_size - 1}")


class FrontModel(ABC):
    """One instance of a Triton model with a front. Subclasses say what their inputs mean (`prompt_of`)."""

    _ledger: Ledger | None = None
    _goes_by_correlation = False

    def __init__(
        self,
        settings: ModelSettings,
        addresses: Sequence[CoreAddress],
        *,
        tensors: Sequence[wire.Tensor],
        may_stream: bool = True,
        publishes_core: bool = False,
    ) -> None:
        """`addresses`: of all cores of the engine model. `tensors`: the inputs, the prompt first. Returns before a core
        is ready.

        Raises ManifestMismatch, CheckpointError, ConfigError.
        """
        self.settings = settings
        self.shutdown = Shutdown(settings.server_pid)
        self._tensors, self._may_stream = tuple(tensors), may_stream
        manifest = EngineManifest.read(settings.engine_dir)
        self.builder = GenerationBuilder(
            manifest,
            Tokenizer.load(settings.engine_dir / "tokenizer"),
            default_max_tokens=settings.number("default_max_tokens", 1),
            exclude_input_in_output=settings.flag("exclude_input_in_output"),
        )
        self._form = AnswerForm(outputs=settings.outputs, is_batched=settings.is_batched)
        self._exporter = exporter = triton.TritonExporter()
        labels = {"model": settings.name, "version": settings.version}
        requests = RequestMetrics(exporter, labels)
        core = None
        if publishes_core:
            instance = {"instance": str(settings.instance)} if settings.num_instances > 1 else {}
            core = CoreMetrics(exporter, {**labels, **instance}, is_ready=lambda: self.front.home_is_ready)
        self._flusher = MetricsFlusher((requests, core) if core is not None else (requests,))
        routing = routing_of(settings, len(addresses))
        self._goes_by_correlation = routing.session_affinity == "correlation"
        self.front = Router(
            addresses,
            self.builder.tokenizer,
            ServingObserver(requests, core),
            routing=routing,
            response_rate=settings.number("response_rate", 0),
            is_ending=self.shutdown.has_begun,
        )
        self.watch = CancellationWatch(self._end_with_the_server)
        self._was_ready = False

    @abstractmethod
    def prompt_of(self, row: Row) -> tuple[tuple[int, ...], TokenWishes, Callable[[], str]]:
        """The prompt's ids, wishes in token ids, and the prompt's text when it is needed."""

    def reply_to(self, request: triton.TritonRequest) -> Reply:
        """The way back, noted in the ledger."""
        reply = Reply(request.get_response_sender())
        if self._ledger is not None:
            reply.keep_in(self._ledger, request)
        return reply

    def serve(self, request: triton.TritonRequest) -> None:
        """Answer one Triton request, now or later; never raises."""
        reply = self.reply_to(request)
        try:
            self._serve(request, reply)
        except PageflightError as error:
            reply.fail(error)
        except Exception:
            log.exception("request %r failed in %s", request.request_id(), self.settings.name)
            reply.fail(PageflightError(f"{self.settings.name} failed on this request; the server's log has the reason"))

    def start(self) -> None:
        """The instance is ready; its metrics may be published."""
        self._flusher.start()
        self._ledger = Ledger(self.settings, "front")

    @property
    def is_ready(self) -> bool:
        """Whether a request would be computed at once: some core answers, and the server is not about to end."""
        return self.front.is_ready

    def close(self) -> None:
        """Let open requests finish, end the rest, publish the last metrics."""
        self.front.close(self.shutdown.left_s())
        self.watch.close()
        self._flusher.close()
        self._exporter.close()
        if self._ledger is not None:
            self._ledger.close()

    def _end_with_the_server(self) -> None:
        if self.shutdown.has_begun() and not self.shutdown.left_s():
            self.front.cut_off()

    def _serve(self, request: triton.TritonRequest, reply: Reply) -> None:
        if not self._was_ready:
            self.front.wait_ready(FIRST_READY_S)
            self.builder.max_model_len = min(self.builder.max_model_len, self.front.limits.max_model_len)
            self.shutdown.serving()
            self._was_ready = True
        parameters = parameters_of(request)
        rows = list(rows_of(request, is_batched=self.settings.is_batched))
        requested = frozenset(request.requested_output_names())
        reply.expect(len(rows))
        session = self._session(request, parameters)
        jobs = [self._job(row, request, parameters, requested, reply, len(rows)) for row in rows]
        submitted: list[int] = []

        def cancel() -> None:
            for number in tuple(submitted):
                self.front.cancel(number)

        try:
            for job in jobs:
                try:
                    submitted.append(self.front.submit(job.generation, job.answer.take, session))
                except InvalidArgument as error:
                    raise as_spelt(error, job.spellings) from None
        except PageflightError:
            cancel()
            raise
        self.watch.add(reply, request.request_id(), cancel)

    def _session(self, request: triton.TritonRequest, parameters: Mapping[str, object]) -> str:
        """What the client calls the conversation: Triton's correlation id, which `generate` has as a parameter."""
        if not self._goes_by_correlation:
            return ""
        return str(request.correlation_id() or parameters.get("sequence_id") or "")

    def _job(
        self,
        row: Row,
        request: triton.TritonRequest,
        parameters: Mapping[str, object],
        requested: frozenset[str],
        reply: Reply,
        num_rows: int,
    ) -> Job:
        options = Options()
        is_from_ensemble = self._form.is_from_ensemble(requested)
        row.add_options(options, self._tensors, _ENSEMBLE_SPELLINGS if is_from_ensemble else {})
        options.add_parameters(parameters)
        add_timeout(options, request)
        if not self._may_stream and options.get("stream", False):
            raise Unsupported("stream", True, f"{self.settings.name} answers with one response; another model streams")
        spellings = {
            **options.spellings,
            "n": options.spellings.get("num_return_sequences", "num_return_sequences"),
            "prompt": _ENSEMBLE_PROMPT if is_from_ensemble else self._tensors[0].name,
        }
        try:
            check_token_ids(options, self.builder.manifest.vocab_size)
            prompt_ids, wishes, prompt_text = self.prompt_of(row)
            generation = self.builder.build(prompt_ids, options, wishes, request_id=request.request_id())
        except InvalidArgument as error:
            raise as_spelt(error, spellings) from None
        excludes = options.get("exclude_input_in_output", self.builder.exclude_input_in_output)
        has_prefix = not excludes and not generation.stream
        answer = Answer(
            reply=reply,
            form=self._form,
            wanted=self._form.wanted(options, requested),
            num_sequences=generation.sampling.n,
            batch_index=row.index if num_rows > 1 else None,
            stream=generation.stream,
            prefix=prompt_text() if has_prefix else "",
            prefix_ids=prompt_ids if has_prefix else (),
            pad_id=self.builder.pad_id(options),
        )
        return Job(generation=generation, answer=answer, spellings=spellings)
