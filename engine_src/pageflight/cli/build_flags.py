"""The options of a build as the command line spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from pageflight.core.config import KVAdmission, LauncherName, SchedulingPolicy, SessionAffinity
from pageflight.core.tenants import read_tenants
from pageflight_build.amounts import parse_bytes, parse_capabilities
from pageflight_build.instances import instances_text, parse_instances
from pageflight_build.options import (
    COLLECTIVES,
    DTYPES,
    ENGINES,
    FLAVORS,
    KV_DTYPES,
    STEP_TOKENS,
    WEIGHTS,
    BuildOptions,
    EngineOptions,
    ServingOptions,
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
            help=f"Precision of the weights: {', '.join(DTYPES)} (int8 and int4 are weight-only, fp8 rounds activations"
            " too; openvino has fp32, bf16, int8 and int4). Default: bf16, but fp32 for CPUs that would emulate it.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    group_size: Annotated[
        int,
        typer.Option(
            help="int8, int4: inputs per scale. 0 is one scale per output channel for int8, the fastest, and the"
            " largest of 128, 64 and 32 that fits for int4.",
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
    flavor: Annotated[
        str,
        typer.Option(
            help=f"tensorrt: {', '.join(FLAVORS)}. rtx builds without a GPU; full is NVIDIA's tensorrt package, which"
            " builds for the GPU it finds.",
            rich_help_panel=_ENGINE,
        ),
    ] = _ENGINE_DEFAULTS.flavor
    compute_capability: Annotated[
        str,
        typer.Option(
            help="tensorrt, flavor rtx: GPUs to build for, such as 89,120. Default: all that the package supports.",
            rich_help_panel=_ENGINE,
        ),
    ] = ""
    weights: Annotated[
        str,
        typer.Option(
            help=f"tensorrt: {', '.join(WEIGHTS)}. As inputs, one engine serves all layers and any checkpoint of the"
            " shape; as constants, every layer has its own.",
            rich_help_panel=_ENGINE,
        ),
    ] = _ENGINE_DEFAULTS.weights
    collectives: Annotated[
        str,
        typer.Option(
            help=f"tensorrt with --tensor-parallel: {', '.join(COLLECTIVES)}. Sums over ranks stand between engines, or"
            " are layers inside them.",
            rich_help_panel=_ENGINE,
        ),
    ] = _ENGINE_DEFAULTS.collectives
    kv_memory: Annotated[
        str,
        typer.Option(
            help="Memory of the K/V cache per instance, such as 4GiB; 0 computes it from free memory at start.",
            rich_help_panel=_SERVING,
        ),
    ] = "0"
    host_kv_memory: Annotated[
        str,
        typer.Option(
            help="Memory per instance for K/V blocks that the cache has no room for, such as 16GiB; 0 is none.",
            rich_help_panel=_SERVING,
        ),
    ] = "0"
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences that run at once, per instance.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.max_num_seqs
    max_num_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of one step: prompt chunks and decode together. 0 chooses by --engine:"
            f" {', '.join(f'{tokens} for {engine}' for engine, tokens in STEP_TOKENS.items())}.",
            rich_help_panel=_SERVING,
        ),
    ] = 0
    max_queue_size: Annotated[
        int, typer.Option(help="Requests that may wait; more are refused with UNAVAILABLE.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.max_queue_size
    max_queue_tokens: Annotated[
        int, typer.Option(help="Prompt tokens that may wait; 0 sets no limit.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.max_queue_tokens
    scheduling_policy: Annotated[
        str,
        typer.Option(
            help=f"Who is served first: {', '.join(get_args(SchedulingPolicy))} (shares between tenants by weight).",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.scheduling_policy
    ageing_s: Annotated[
        float,
        typer.Option(
            help="Seconds of waiting that are worth one level of priority; 0: none ever.", rich_help_panel=_SERVING
        ),
    ] = _SERVING_DEFAULTS.ageing_s
    tenants: Annotated[
        Path | None,
        typer.Option(help="File with weights, quotas and K/V budgets by tenant (JSON).", rich_help_panel=_SERVING),
    ] = None
    kv_admission: Annotated[
        str,
        typer.Option(
            help=f"When a sequence starts: {', '.join(get_args(KVAdmission))} (room for its full length first).",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.kv_admission
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            help="Share of a GPU's memory that weights, one step and the K/V cache may take together.",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.gpu_memory_utilization
    kv_watermark: Annotated[
        float,
        typer.Option(help="Share of the K/V blocks that stays free when a sequence starts.", rich_help_panel=_SERVING),
    ] = _SERVING_DEFAULTS.kv_watermark
    target_inter_token_ms: Annotated[
        float,
        typer.Option(
            help="Time between tokens to hold while prompts come in, by smaller prompt chunks; 0 sets none.",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.target_inter_token_ms
    hang_limit_s: Annotated[
        int,
        typer.Option(
            help="Seconds without a sign of life after which an engine core is started again. Must exceed the longest"
            " step.",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.hang_limit_s
    instances: Annotated[
        str,
        typer.Option(
            help='Engine instances, each with its own core process and cache: how many, or their devices, as in "gpu0;'
            ' gpu1 dtype=bf16; cpu:0-3 engine=openvino" (see docs/instances.md).',
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.instances
    session_affinity: Annotated[
        str,
        typer.Option(
            help=f"Requests that go to one instance: {', '.join(get_args(SessionAffinity))} (those with the same"
            " beginning, or the same correlation id).",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.session_affinity
    reroute_after_s: Annotated[
        float,
        typer.Option(
            help="Seconds that sequences wait for their instance's next core before another instance takes them.",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.reroute_after_s
    threads: Annotated[
        int, typer.Option(help="Compute threads per instance; 0 shares all cores.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.threads
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="Processes, or GPUs, that compute each layer of an instance together; must divide the attention heads"
            " (see docs/parallel.md).",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.tensor_parallel
    pipeline_parallel: Annotated[
        int,
        typer.Option(
            help="Stages of consecutive layers of an instance, each with tensor-parallel processes; at most as many as"
            " there are layers (see docs/parallel.md).",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.pipeline_parallel
    launcher: Annotated[
        str,
        typer.Option(
            help=f"Who starts the other ranks: {', '.join(get_args(LauncherName))} (see docs/machines.md).",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.launcher
    nodes: Annotated[
        int,
        typer.Option(help="Machines that share an instance's ranks alike.", rich_help_panel=_SERVING),
    ] = _SERVING_DEFAULTS.nodes
    rank_port: Annotated[
        int,
        typer.Option(
            help="Port of the first machine where ranks of launcher external dial in.", rich_help_panel=_SERVING
        ),
    ] = _SERVING_DEFAULTS.rank_port
    rank_wait_s: Annotated[
        float,
        typer.Option(help="Seconds that a core waits for ranks that others start.", rich_help_panel=_SERVING),
    ] = _SERVING_DEFAULTS.rank_wait_s
    ray_address: Annotated[
        str, typer.Option(help="HOST:PORT of the Ray cluster of --launcher ray; auto: RAY_ADDRESS, or the one here.")
    ] = _SERVING_DEFAULTS.ray_address
    prefix_cache: Annotated[
        bool, typer.Option(help="Reuse the K/V blocks of prompts that begin alike.", rich_help_panel=_SERVING)
    ] = True
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Answers do not depend, to the last bit, on other requests, interruptions or the cache (see"
            " docs/determinism.md).",
            rich_help_panel=_SERVING,
        ),
    ] = False
    default_max_tokens: Annotated[
        int, typer.Option(help="max_tokens of requests that name none.", rich_help_panel=_SERVING)
    ] = _SERVING_DEFAULTS.default_max_tokens
    response_rate: Annotated[
        int,
        typer.Option(
            help="Responses per second before the tokens of a stream are joined; 0 follows the number of cores.",
            rich_help_panel=_SERVING,
        ),
    ] = _SERVING_DEFAULTS.response_rate
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
                flavor=self.flavor,
                compute_capability=parse_capabilities(self.compute_capability),
                weights=self.weights,
                collectives=self.collectives,
            ),
            serving=ServingOptions(
                kv_memory=parse_bytes(self.kv_memory),
                host_kv_memory=parse_bytes(self.host_kv_memory),
                max_num_seqs=self.max_num_seqs,
                max_num_tokens=self.max_num_tokens or max(STEP_TOKENS[self.engine], self.max_num_seqs),
                max_queue_size=self.max_queue_size,
                max_queue_tokens=self.max_queue_tokens,
                scheduling_policy=cast(SchedulingPolicy, self.scheduling_policy),
                ageing_s=self.ageing_s,
                tenants=self._tenants(),
                kv_admission=cast(KVAdmission, self.kv_admission),
                gpu_memory_utilization=self.gpu_memory_utilization,
                kv_watermark=self.kv_watermark,
                target_inter_token_ms=self.target_inter_token_ms,
                hang_limit_s=self.hang_limit_s,
                instances=instances_text(parse_instances(self.instances)),
                session_affinity=cast(SessionAffinity, self.session_affinity),
                reroute_after_s=self.reroute_after_s,
                threads=self.threads,
                tensor_parallel=self.tensor_parallel,
                pipeline_parallel=self.pipeline_parallel,
                launcher=cast(LauncherName, self.launcher),
                nodes=self.nodes,
                rank_port=self.rank_port,
                rank_wait_s=self.rank_wait_s,
                ray_address=self.ray_address,
                engine_name=self.engine_name,
                exclude_input_in_output=self.exclude_input_in_output,
                default_max_tokens=self.default_max_tokens,
                response_rate=self.response_rate,
                prefix_cache=self.prefix_cache,
                deterministic=self.deterministic,
            ),
            default=self.default,
            force=self.force,
        )

    def _tenants(self) -> str:
        """The tenants file's absolute path. Raises ConfigError for one that cannot be read."""
        if self.tenants is None:
            return ""
        read_tenants(self.tenants)
        return str(self.tenants.resolve())
