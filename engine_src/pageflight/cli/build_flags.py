"""The options of a build as the command line spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pageflight_build.options import (
    DTYPES,
    ENGINES,
    KV_DTYPES,
    BuildOptions,
    EngineOptions,
    ServingOptions,
    parse_bytes,
)
from pageflight_build.source import default_name, resolve_checkpoint

_ENGINE, _SERVING = "Engine", "Serving (kept in config.pbtxt)"
_ENGINE_DEFAULTS, _SERVING_DEFAULTS = EngineOptions(), ServingOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFlags:
    """What `build` and `up` share. Defaults are those of the option classes."""

    name: Annotated[
        str | None,
        typer.Option(help="Name of the model in Triton and in URLs; by default the checkpoint's last part."),
    ] = None
    engine: Annotated[
        str, typer.Option(help=f"What the model is lowered to: {', '.join(ENGINES)}.", rich_help_panel=_ENGINE)
    ] = _ENGINE_DEFAULTS.engine
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Precision of the weights: {', '.join(DTYPES)} (int8 is weight-only). Default: bf16 on CPUs that"
            " multiply it natively, else fp32.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    group_size: Annotated[
        int,
        typer.Option(
            help="int8: inputs per scale. 0 is one scale per output channel, the fastest; 64 is finer.",
            rich_help_panel=_ENGINE,
        ),
    ] = _ENGINE_DEFAULTS.group_size
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Precision of the K/V cache: {', '.join(KV_DTYPES)}. Default: that of the activations.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    max_model_len: Annotated[
        int, typer.Option(help="Longest sequence in tokens; 0 is the model's own limit.", rich_help_panel=_ENGINE)
    ] = _ENGINE_DEFAULTS.max_model_len
    kv_memory: Annotated[
        str,
        typer.Option(
            help="Memory of the K/V cache per instance, such as 4GiB; 0 computes it from free memory at start.",
            rich_help_panel=_SERVING,
        ),
    ] = "0"
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences that run at once, per instance.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.max_num_seqs
    max_num_tokens: Annotated[
        int, typer.Option(help="Tokens of one step: prompt chunks and decode together.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.max_num_tokens
    max_queue_size: Annotated[
        int, typer.Option(help="Requests that may wait; more are refused with UNAVAILABLE.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.max_queue_size
    instances: Annotated[
        int, typer.Option(help="Engine instances, each with its own core process and cache.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.instances
    threads: Annotated[
        int, typer.Option(help="Compute threads per instance; 0 shares all cores.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.threads
    prefix_cache: Annotated[
        bool, typer.Option(help="Reuse the K/V blocks of prompts that begin alike.", rich_help_panel=_SERVING)
    ] = True
    default_max_tokens: Annotated[
        int, typer.Option(help="max_tokens of requests that name none.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.default_max_tokens
    exclude_input_in_output: Annotated[
        bool,
        typer.Option(
            help="Answers hold the completion only; otherwise they begin with the prompt.", rich_help_panel=_SERVING
        ),
    ] = True
    engine_name: Annotated[
        str,
        typer.Option(
            help="Name of the engine model; tensorrt_llm serves clients that call it by that name.",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.engine_name
    default: Annotated[
        bool, typer.Option("--default", help="In a repository of several models: this one owns `ensemble`.")
    ] = False
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Build again, and replace files edited by hand or a repository of another program."
        ),
    ] = False

    def options(self, checkpoint: str, repository: Path) -> BuildOptions:
        """The checked options. Raises CheckpointError when the checkpoint is not found, ConfigError for a bad value."""
        return BuildOptions(
            checkpoint=resolve_checkpoint(checkpoint),
            repository=repository,
            name=self.name or default_name(checkpoint),
            engine=EngineOptions(
                engine=self.engine,
                dtype=self.dtype,
                group_size=self.group_size,
                kv_dtype=self.kv_dtype,
                max_model_len=self.max_model_len,
            ),
            serving=ServingOptions(
                kv_memory=parse_bytes(self.kv_memory),
                max_num_seqs=self.max_num_seqs,
                max_num_tokens=self.max_num_tokens,
                max_queue_size=self.max_queue_size,
                instances=self.instances,
                threads=self.threads,
                engine_name=self.engine_name,
                exclude_input_in_output=self.exclude_input_in_output,
                default_max_tokens=self.default_max_tokens,
                prefix_cache=self.prefix_cache,
            ),
            default=self.default,
            force=self.force,
        )
