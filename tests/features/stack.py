"""Everything between Triton's request and the model, in this process: checks, front, sockets, loop, scheduler."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton_stub import InferenceResponse, Tensor

from models import MAX_LEN
from pageflight.backend.engine import EngineModel
from pageflight.backend.front_model import FrontModel
from pageflight.backend.inputs import as_word_list
from pageflight.backend.settings import ModelSettings
from pageflight.core import wire
from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.plan import StepPlan
from pageflight.core.stats import CoreStats
from pageflight.loop.address import CoreAddress, private_address
from pageflight.loop.engine_loop import Drain, EngineLoop
from pageflight.loop.frames import CoreLimits
from pageflight.loop.mailbox import ZmqMailbox
from pageflight.loop.recorder import Recorder
from pageflight.loop.recording import Header
from pageflight.loop.watched_scheduler import WatchedScheduler
from pageflight.lowering.base import CompiledModel
from pageflight.runners.local import LocalRunner
from pageflight_build.triton_config import Deployment, model_configs

WAIT_S = 60.0
TENSOR_TYPES = {tensor.name: tensor for tensor in wire.ENGINE_INPUTS}
NUMPY = {"INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
DEFAULTS = {
    "max_num_tokens": 64,
    "max_num_seqs": 8,
    "max_model_len": MAX_LEN,
    "num_tokens": 640,
    "num_host_tokens": 0,
    "prefix_cache": False,
}
"""`num_tokens` and `num_host_tokens` stand for as many blocks as hold them."""


class CoreDied(Exception):
    """Stands for a core's death: no word to anybody."""


class Sender:
    """A Triton request's way back; keeps everything."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.is_over = threading.Event()
        self.wants_to_cancel = False
        self.was_asked = threading.Event()
        """Somebody has learnt that the client cancels."""

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.is_over.is_set(), "a response after the final one"
        if response is not None:
            self.responses.append(response)
        if flags:
            self.is_over.set()

    def is_cancelled(self) -> bool:
        assert not self.is_over.is_set(), "Triton's sender must not be asked after the final response"
        if self.wants_to_cancel:
            self.was_asked.set()
        return self.wants_to_cancel


@dataclass
class Got:
    """What a client has at the end."""

    num_responses: int
    errors: list[tuple[str, str]] = field(default_factory=list)
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    log_probs: dict[int, list[float]] = field(default_factory=dict)
    finals: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, sender: Sender) -> Got:
        got = cls(len(sender.responses))
        for response in sender.responses:
            if response.error is not None:
                got.errors.append((response.error.code, response.error.message))
                continue
            tensors = {tensor.name(): tensor.as_numpy()[0] for tensor in response.output_tensors}
            got._take(tensors)
        return got

    def _take(self, tensors: dict[str, np.ndarray]) -> None:
        rows = range(len(tensors["text_output"]))
        for row in rows:
            index = int(tensors["sequence_index"][0]) if "sequence_index" in tensors else row
            count = int(tensors["sequence_length"][row])
            self.ids.setdefault(index, []).extend(tensors["output_ids"][row][:count].tolist())
            self.text[index] = self.text.get(index, "") + tensors["text_output"][row].decode()
            if "output_log_probs" in tensors:
                self.log_probs.setdefault(index, []).extend(tensors["output_log_probs"][row][:count].tolist())
            if "finish_reason" in tensors:
                final = {"finish_reason": tensors["finish_reason"][row].decode()}
                for name in ("num_output_tokens", "cum_log_probs"):
                    if name in tensors:
                        final[name] = tensors[name][row].item()
                scalars = {n: a.item() for n, a in tensors.items() if a.size == 1 and a.dtype != np.object_}
                self.finals[index] = {**scalars, **final}


class Runner(LocalRunner):
    """Calls `before_step` with the number of steps that this core has begun."""

    before_step: Callable[[int], None] = staticmethod(lambda number: None)
    num_steps = num_partial_chunks = 0

    def submit(self, plan: StepPlan) -> None:
        self.before_step(self.num_steps)
        self.num_steps += 1
        self.num_partial_chunks += int((~plan.samples).sum())
        super().submit(plan)


class Engine(EngineModel):
    """The model `engine` with its front; its core runs in this process."""

    def __init__(self, settings: ModelSettings, address: CoreAddress) -> None:
        FrontModel.__init__(self, settings, (address,), tensors=wire.ENGINE_INPUTS)


class Core:
    """One life of a core, on a thread of its own."""

    def __init__(
        self, address: CoreAddress, config: EngineConfig, model: CompiledModel, recording: Path | None, check: bool
    ) -> None:
        kv, limits = config.kv, config.scheduler
        self.runner = Runner(
            model,
            num_blocks=kv.num_blocks,
            num_host_blocks=kv.num_host_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            deterministic=limits.deterministic,
        )
        limits = replace(limits, replay_rows=self.runner.limits.replay_rows)
        config = replace(config, scheduler=limits)
        self._recorder = None
        if recording is not None:
            header = Header(config=config, vocab_size=model.vocab_size)
            self._recorder = Recorder(recording, header)
        self.scheduler = WatchedScheduler(
            limits, kv, vocab_size=model.vocab_size, recorder=self._recorder, check_every=int(check)
        )
        told = CoreLimits(
            max_model_len=limits.max_model_len,
            num_blocks=kv.num_blocks,
            block_size=kv.block_size,
            vocab_size=model.vocab_size,
            max_num_seqs=limits.max_num_seqs,
            max_queue_size=limits.max_queue_size,
        )
        self._mailbox = ZmqMailbox(address, told, beat=lambda: None)
        self._loop = EngineLoop(scheduler=self.scheduler, runner=self.runner, mailbox=self._mailbox)
        self.has_died = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="core")
        self._thread.start()

    def _run(self) -> None:
        linger_s = 0.0
        try:
            self._loop.run()
            linger_s = 0.5
        except CoreDied:
            self.has_died.set()
        except BaseException as error:
            self.failure = error
            self.has_died.set()
        finally:
            self._mailbox.close(linger_s)
            if self._recorder is not None:
                self._recorder.close()

    def stats(self) -> CoreStats:
        return self.scheduler.stats()

    def close(self) -> None:
        if not self.has_died.is_set():
            self._mailbox.stop(Drain())
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self.runner.close()
        if self.failure is not None:
            raise self.failure


class Stack:
    """An engine that answers Triton requests, and the cores it had."""

    def __init__(
        self,
        engine_dir: Path,
        load: Callable[[], CompiledModel],
        settings: Mapping[str, Any],
        parameters: Mapping[str, str],
        recordings: Path | None,
    ) -> None:
        self._load, self._recordings = load, recordings
        self._address = private_address()
        self._address.create()
        model = load()
        merged = {**DEFAULTS, **settings, "block_size": model.block_size, "token_tile": model.token_tile}
        merged["num_blocks"] = max(3, merged.pop("num_tokens") // model.block_size)
        merged["num_host_blocks"] = merged.pop("num_host_tokens") // model.block_size
        kv_names = {item.name for item in fields(KVConfig)}
        self.config = EngineConfig(
            kv=KVConfig(**{name: value for name, value in merged.items() if name in kv_names}),
            scheduler=SchedulerConfig(**{name: value for name, value in merged.items() if name not in kv_names}),
        )
        self.cores = [self._core(model)]
        self.engine = Engine(_model_settings(engine_dir, parameters), self._address)
        self.engine.front.wait_ready(WAIT_S)

    @property
    def core(self) -> Core:
        return self.cores[-1]

    def stats(self) -> list[CoreStats]:
        return [core.stats() for core in self.cores]

    def begin_another_core(self) -> None:
        """After the death of the last one."""
        assert self.core.has_died.wait(WAIT_S), "the core lives"
        self.core.close()
        self.cores.append(self._core(self._load()))

    def ask(self, prompt: tuple[int, ...], options: Mapping[str, Any], outputs: frozenset[str]) -> Sender:
        """Send a request; its answer comes to the sender."""
        sender = Sender()
        tensors, parameters = [Tensor("input_ids", np.array([prompt], np.int32))], {}
        for name, value in options.items():
            if name in ("stop_words_list", "bad_words_list"):
                tensors.append(Tensor(name, as_word_list(tuple(word) for word in value)[None]))
            elif name in TENSOR_TYPES:
                tensors.append(Tensor(name, _array(TENSOR_TYPES[name], value)))
            elif isinstance(value, dict):
                parameters[name] = {str(key): entry for key, entry in value.items()}
            else:
                parameters[name] = list(value) if isinstance(value, tuple) else value
        request = SimpleNamespace(
            inputs=lambda: tensors,
            parameters=lambda: json.dumps(parameters),
            request_id=lambda: "",
            timeout=lambda: 0,
            requested_output_names=lambda: outputs,
            get_response_sender=lambda: sender,
        )
        self.engine.serve(request)
        return sender

    def close(self) -> None:
        self.engine.front.close(0.0)
        self.engine.watch.close()
        self.core.close()
        self._address.remove()

    def _core(self, model: CompiledModel) -> Core:
        recording = None
        if self._recordings is not None:
            recording = self._recordings / f"{time.monotonic_ns()}.rec"
        return Core(self._address, self.config, model, recording, check=True)


@contextmanager
def running_stack(
    engine_dir: Path,
    load: Callable[[], CompiledModel],
    settings: Mapping[str, Any],
    parameters: Mapping[str, str],
    recordings: Path | None = None,
) -> Iterator[Stack]:
    stack = Stack(engine_dir, load, settings, parameters, recordings)
    try:
        yield stack
    finally:
        stack.close()


def _array(tensor: wire.Tensor, value: Any) -> np.ndarray:
    values = value if isinstance(value, list | tuple) else [value]
    if tensor.dtype == "STRING":
        return np.array([[word.encode() for word in values]], np.object_)
    return np.array([values], NUMPY[tensor.dtype])


def _model_settings(engine_dir: Path, parameters: Mapping[str, str]) -> ModelSettings:
    generated = model_configs(Deployment(name="any"))["engine"].parameters
    own = {name: entry.string_value for name, entry in generated.items()}
    return ModelSettings(
        name="engine",
        version="1",
        repository=engine_dir,
        instance=0,
        num_instances=1,
        is_batched=True,
        outputs=frozenset(tensor.name for tensor in wire.ENGINE_OUTPUTS),
        parameters={**own, "engine_dir": ".", **parameters},
        server_pid=1,
    )
