"""An engine of a repository, run right here: the same front, core and option checks as in Triton, without Triton."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageflight.backend.generations import GenerationBuilder
from pageflight.backend.options import Options
from pageflight.cli.client import Answer
from pageflight.cli.console import console
from pageflight.cli.inspect_repository import engine_named
from pageflight.core.config import EngineConfig, KVConfig
from pageflight.core.events import TokenEvent
from pageflight.core.manifest import EngineManifest
from pageflight.loop.front import Front
from pageflight.loop.local import start_local
from pageflight.loop.supervisor import SupervisorConfig
from pageflight.loop.watch import Watch
from pageflight.text.tokenizer import Tokenizer
from pageflight_build.options import ServingOptions
from pageflight_build.record import RepositoryRecord


@dataclass(frozen=True, slots=True, eq=False)
class LocalEngine:
    """Answers like `client.Server`."""

    front: Front
    builder: GenerationBuilder

    def stream(self, model: str, request: Mapping[str, Any]) -> Iterator[Answer]:
        """Responses of one request as they come; `model` does not matter here. Raises the request's own error."""
        options = Options()
        for name, value in {**request, "stream": True}.items():
            if name != "text_input":
                options.add(name, value)
        prompt_ids = self.builder.encode_prompt("text_input", str(request["text_input"]))
        generation = self.builder.build(prompt_ids, options)
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        submitted = self.front.submit(generation, events.put)
        open_sequences = generation.sampling.n
        try:
            while open_sequences:
                event = events.get()
                if event.error is not None:
                    raise event.error
                yield _answer(event)
                open_sequences -= event.final
        finally:
            if open_sequences:
                self.front.cancel(submitted)


@contextmanager
def local_engine(repository: Path, name: str | None = None, watch: Watch | None = None) -> Iterator[LocalEngine]:
    """The engine of `repository`, running for as long as the block lasts, with the settings it was built with, but
    with all ranks on this machine."""
    engine_dir = engine_named(repository, name)
    manifest = EngineManifest.read(engine_dir)
    serving = _serving(repository, manifest.name)
    config = EngineConfig(
        kv=KVConfig(
            block_size=manifest.block_size,
            memory_bytes=serving.kv_memory,
            prefix_cache=serving.prefix_cache,
            host_memory_bytes=serving.host_kv_memory,
            gpu_memory_utilization=serving.gpu_memory_utilization,
        ),
        scheduler=serving.scheduler(max_model_len=manifest.max_model_len),
        num_threads=serving.threads,
        tensor_parallel=serving.tensor_parallel,
        pipeline_parallel=serving.pipeline_parallel,
    )
    builder = GenerationBuilder(
        manifest,
        Tokenizer.load(engine_dir / "tokenizer"),
        default_max_tokens=serving.default_max_tokens,
        exclude_input_in_output=True,
    )
    supervision = SupervisorConfig(hang_limit_s=serving.hang_limit_s)
    with ExitStack() as stack:
        with console.status("Loading the engine …"):
            front = stack.enter_context(
                start_local(engine_dir, config, watch=watch, tenants_file=serving.tenants, supervision=supervision)
            )
        yield LocalEngine(front, builder)


def _serving(repository: Path, name: str) -> ServingOptions:
    record = RepositoryRecord.read(repository)
    model = record.model(name) if record is not None else None
    return model.serving if model is not None else ServingOptions()


def _answer(event: TokenEvent) -> dict[str, Any]:
    answer: dict[str, Any] = {"text_output": event.text, "sequence_index": event.sequence_index}
    if event.finish_reason is not None:
        answer["finish_reason"] = event.finish_reason
    if event.usage is not None:
        answer["num_input_tokens"] = event.usage.num_input_tokens
        answer["num_output_tokens"] = event.usage.num_output_tokens
    return answer
