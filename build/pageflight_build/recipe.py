"""The build: named stages from a checkpoint to a repository in its place.

read → convert → describe → verify → assemble. Engines that are compiled ahead of time, for devices that need not be
here, have a stage for it instead of the one that verifies. Everything happens in a folder beside the target; the last
act is to give that folder the target's name. A build that fails or is interrupted leaves the target as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight.core.placement import Ranks, ranks_of
from pageflight.lowering.base import AheadOfTime, Lowering
from pageflight.models.config import DecoderConfig
from pageflight.models.stages import check_nodes
from pageflight.quant.convert import convert
from pageflight.quant.store import WEIGHTS_NAME
from pageflight_build import repository
from pageflight_build.checkpoint_files import TOKENIZER_FOLDER, copy_text_files
from pageflight_build.engine import (
    Source,
    check_ranks,
    make_manifest,
    read_source,
    record_files,
    resolve_engine_options,
)
from pageflight_build.inputs import engine_inputs
from pageflight_build.instances import FIRST_FOLDER, InstanceSpec, engine_folder, parse_instances
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.progress import BuildProgress, Silent, StageReport
from pageflight_build.record import EngineRecord, ModelRecord
from pageflight_build.reference import reference_logits
from pageflight_build.swap import link_or_copy, put_in_place, staging_folder
from pageflight_build.target import lowering_of, ranks_cut_for
from pageflight_build.verify import REFERENCE_MAX_PARAMETERS, verification_ids, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """Where the model is served from. `reused` means that nothing had to be done."""

    repository: Path
    name: str
    engine_dir: Path
    manifest: EngineManifest
    reused: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One named step; `run` returns the line that sums it up."""

    title: str
    run: Callable[[StageReport], str]


def build(options: BuildOptions, progress: BuildProgress | None = None) -> BuildResult:
    """Build one checkpoint into `options.repository`, or find that it is there already.

    Raises CheckpointError for a checkpoint that cannot be served, ConfigError for options or a target folder that
    cannot work. The repository is changed in one step at the very end, or not at all.
    """
    started = time.monotonic()
    progress = progress or Silent()
    target = options.repository.expanduser().resolve()
    with repository.locked(target):
        record = repository.open_target(target, force=options.force)
        engines = engines_of(options)
        wanted = ModelRecord(
            name=options.name,
            checkpoint=str(options.checkpoint),
            engines=tuple(
                EngineRecord(folder=engine.folder, inputs=engine.inputs, engine=engine.options.engine)
                for engine in engines
            ),
            serving=options.serving,
            default=options.default,
        )
        distinct = {engine.folder: engine for engine in engines}
        lowerings = {
            engine.folder: lowering_of(engine.options, options.serving, engine.num_ranks)
            for engine in distinct.values()
        }
        kept: dict[str, Path] = {}
        for folder, engine in distinct.items():
            found = repository.engine_kept(target, record, wanted, engine.inputs, lowerings[folder])
            if found is not None and not options.force:
                kept[folder] = found
                _check_kept(EngineManifest.read(found), engine.ranks)
        if len(kept) == len(distinct) and repository.unchanged(record, wanted):
            first = kept[FIRST_FOLDER]
            return BuildResult(
                repository=target,
                name=wanted.name,
                engine_dir=first,
                manifest=EngineManifest.read(first),
                reused=True,
                seconds=time.monotonic() - started,
            )
        assembly = repository.Assembly(target, record, wanted, force=options.force)
        with staging_folder(target) as staged:
            artifacts = {folder: staged / Path(folder).name for folder in distinct}
            for folder, engine in distinct.items():
                if folder in kept:
                    link_or_copy(kept[folder], artifacts[folder])
                else:
                    build_one = replace(options, engine=engine.options)
                    note = f" ({engine.title})" if len(distinct) > 1 else ""
                    made = _Engine(build_one, lowerings[folder], artifacts[folder], engine.ranks, engine.num_ranks)
                    _run(made.stages(), progress, note)
            root = staged / "repository"
            _run((Stage(title="assemble", run=lambda report: assembly.write(root, artifacts)),), progress)
            put_in_place(root, target)
    engine_dir = repository.engine_dir(target, assembly.models, wanted.name)
    return BuildResult(
        repository=target,
        name=wanted.name,
        engine_dir=engine_dir,
        manifest=EngineManifest.read(engine_dir),
        reused=False,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedEngine:
    """The engine of an instance: its options, their digest, its place in the engine model's folder, who it is for, the
    ranks of those who share it, and how many ranks of a layer it is cut for: 1 where it is the same for any."""

    options: EngineOptions
    inputs: str
    folder: str
    title: str
    ranks: frozenset[Ranks]
    num_ranks: int


def engines_of(options: BuildOptions) -> tuple[WantedEngine, ...]:
    """Of each instance in their order; one where all are alike. Raises ConfigError for options that cannot work."""
    instances = parse_instances(options.serving.instances)
    if all(instance.devices.kind == "any" for instance in instances):
        instances = instances[:1]
    wanted = [instance.engine_options(options.engine) for instance in instances]
    _check_launcher(options.serving, instances)
    default = Ranks(options.serving.tensor_parallel, options.serving.pipeline_parallel)
    ranks = [
        ranks_of(instance.devices, instance.tensor_parallel, instance.pipeline_parallel, default)
        for instance in instances
    ]
    for each in ranks:
        check_nodes(
            EngineConfig(
                tensor_parallel=each.tensor_parallel,
                pipeline_parallel=each.pipeline_parallel,
                launcher=options.serving.launcher,
                num_nodes=options.serving.nodes,
                rank_port=options.serving.rank_port,
                rank_wait_s=options.serving.rank_wait_s,
                ray_address=options.serving.ray_address,
            )
        )
    cuts = [ranks_cut_for(engine, each.tensor_parallel) for engine, each in zip(wanted, ranks, strict=True)]
    folders = [engine_folder(engine, cut, (wanted[0], cuts[0])) for engine, cut in zip(wanted, cuts, strict=True)]
    return tuple(
        WantedEngine(
            options=engine,
            inputs=engine_inputs(options.checkpoint, engine, options.serving, cut),
            folder=folder,
            title=str(instance),
            ranks=frozenset(each for each, other in zip(ranks, folders, strict=True) if other == folder),
            num_ranks=cut,
        )
        for instance, engine, cut, folder in zip(instances, wanted, cuts, folders, strict=True)
    )


class _Engine:
    """The stages that make an engine directory at `folder`. `ranks`: those of its instances; `num_ranks`: how many of a
    layer it is cut for."""

    def __init__(
        self, options: BuildOptions, lowering: Lowering, folder: Path, ranks: Iterable[Ranks], num_ranks: int
    ) -> None:
        self._build, self._ranks, self._num_ranks = options, ranks, num_ranks
        self._lowering = lowering
        self._folder = folder
        self._source: Source
        self._options: EngineOptions
        self._manifest: EngineManifest

    def stages(self) -> tuple[Stage, ...]:
        convert, describe = Stage(title="convert", run=self._convert), Stage(title="describe", run=self._describe)
        if isinstance(self._lowering, AheadOfTime):  # for a device that is not here: nobody can ask the engine anything
            compile_ = Stage(title="compile", run=partial(self._compile, self._lowering))
            return (Stage(title="read", run=self._read), convert, compile_, describe)
        return (Stage(title="read", run=self._read), convert, describe, Stage(title="verify", run=self._verify))

    def _read(self, report: StageReport) -> str:
        self._source = read_source(self._build.checkpoint)
        config = self._source.config
        self._options = resolve_engine_options(self._build.engine, config, self._lowering)
        options = self._options
        assert options.dtype is not None
        for ranks in self._ranks:
            check_ranks(
                *ranks,
                config,
                engine=options.engine,
                dtype=options.dtype,
                group_size=options.group_size,
            )
        if self._build.serving.deterministic and isinstance(self._lowering, AheadOfTime):
            raise ConfigError(f"deterministic=True: it has to be tried, but {self._lowering.missing_device()}")
        return (
            f"{config.family}, {config.num_parameters / 1e6:,.1f} M parameters, {config.num_layers} layers,"
            f" hidden {config.hidden_size}, {config.max_positions} positions"
        )

    def _convert(self, report: StageReport) -> str:
        options, source = self._options, self._source
        assert options.dtype is not None
        copy_text_files(source.folder, self._folder / TOKENIZER_FOLDER)
        converted = convert(
            source.weights,
            source.config,
            self._folder / WEIGHTS_NAME,
            dtype=options.dtype,
            group_size=options.group_size,
            progress=report.advance,
        )
        groups = f" in groups of {options.group_size}" if options.group_size else ""
        return f"{options.dtype}{groups}, {converted.num_bytes / 1e6:,.1f} MB"

    def _compile(self, lowering: AheadOfTime, report: StageReport) -> str:
        options = self._options
        assert options.dtype is not None
        return lowering.compile(
            self._folder,
            self._source.config,
            dtype=options.dtype,
            group_size=options.group_size,
            max_model_len=options.max_model_len,
            advance=report.advance,
        )

    def _describe(self, report: StageReport) -> str:
        files = record_files(self._folder, report.advance)
        manifest = make_manifest(self._build.name, self._source, self._options, self._lowering, self._num_ranks)
        self._manifest = replace(manifest, files=files)
        self._manifest.write(self._folder)
        return f"{len(files)} files; {', '.join(f'{k} {v}' for k, v in manifest.fingerprint.items())}"

    def _verify(self, report: StageReport) -> str:
        manifest, source = self._manifest, self._source
        ids = verification_ids(manifest.vocab_size, manifest.max_model_len)
        reference = None
        if source.config.num_parameters <= REFERENCE_MAX_PARAMETERS:
            reference = reference_logits(source.weights, source.config, ids)
        lowering, serving = self._lowering, self._build.serving
        model = lowering.load(self._folder, num_threads=serving.threads)
        try:
            if serving.deterministic:
                most = serving.max_num_tokens + manifest.block_size
                model = lowering.deterministic(model, name=manifest.title, max_num_tokens=most)
            result = verify(model, ids, dtype=manifest.dtype, kv_dtype=manifest.kv_dtype, reference=reference)
        finally:
            model.close()
        if serving.deterministic:
            self._manifest = replace(manifest, deterministic=True)
            self._manifest.write(self._folder)
        compared = "not compared with a reference (too large)"
        if result.reference_error is not None:
            compared = f"{result.reference_error:.2g} from the reference"
        alike = "; the same bits in any company" if serving.deterministic else ""
        return f"logits {compared}, {result.chunk_error:.2g} between chunkings (limit {result.limit:.2g}){alike}"


def _check_launcher(serving: ServingOptions, instances: Sequence[InstanceSpec]) -> None:
    """Raises ConfigError for instances that the launcher cannot have."""
    num_instances = len(parse_instances(serving.instances))
    if serving.launcher == "external" and num_instances > 1:
        raise ConfigError(
            f"instances={num_instances}: launcher external has one instance, whose ranks dial in to rank_port"
        )
    named = [str(instance.devices) for instance in instances if instance.devices.kind != "any"]
    if serving.launcher != "local" and named:
        instead = ", or set CUDA_VISIBLE_DEVICES on each machine" if serving.launcher == "external" else ""
        raise ConfigError(
            f"instances={named[0]}: launcher {serving.launcher} uses each machine's GPUs, or all its cores: devices"
            f" named here would hold for one machine only; leave them out{instead}"
        )


def _check_kept(manifest: EngineManifest, ranks: Iterable[Ranks]) -> None:
    """Raises ConfigError for settings that an engine built for others does not have."""
    config = DecoderConfig.from_json(manifest.model)
    for each in ranks:
        check_ranks(
            *each,
            config,
            engine=manifest.lowering,
            dtype=manifest.dtype,
            group_size=manifest.quant_group_size,
        )


def _run(stages: tuple[Stage, ...], progress: BuildProgress, note: str = "") -> None:
    """`note`: what the stages are for, where there are others of their name."""
    for stage in stages:
        with _stage(progress, stage.title + note) as report:
            summary = stage.run(report)
        progress.done(stage.title + note, summary)


@contextmanager
def _stage(progress: BuildProgress, title: str) -> Iterator[StageReport]:
    """A stage of `progress`; what goes wrong without being one of our errors is named by its stage."""
    with ExitStack() as stack:
        report = stack.enter_context(progress.stage(title))
        try:
            yield report
        except MemoryError:
            raise ConfigError(
                f"the build ran out of memory in stage {title!r}; free memory or use another machine"
            ) from None
        except OSError as error:
            raise ConfigError(f"stage {title!r}: {error.strerror or error} ({error.filename})") from error
