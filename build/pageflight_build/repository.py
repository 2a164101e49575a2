"""The model repository as a folder: whose it is, where engines lie in it, and how a new state of it is assembled."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import EngineManifest
from pageflight.lowering.base import Lowering
from pageflight_build.instances import FIRST_FOLDER, parse_instances
from pageflight_build.placing import placements_of, utilizations_of
from pageflight_build.record import ModelRecord, RepositoryRecord, file_digest
from pageflight_build.swap import link_or_copy
from pageflight_build.triton_config import Deployment, engine_model_name, model_names, write_repository


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Only one build at a time changes what lies beside `target`; leftovers of builds that were killed are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for leftover in target.parent.glob(f".{target.name}.*.building"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def open_target(target: Path, *, force: bool) -> RepositoryRecord:
    """The record of the repository at `target`, empty where there is nothing yet.

    Raises ConfigError for a folder that this program did not make. `force` replaces such a folder too, if it is a
    model repository; anything else is never removed.
    """
    empty = RepositoryRecord(generated={})
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return empty
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; choose another --repository")
    try:
        record = RepositoryRecord.read(target)
    except ConfigError:
        if not force:
            raise
        return empty
    if record is not None:
        return record
    foreign = [entry.name for entry in target.iterdir() if not (entry / "config.pbtxt").is_file()]
    if foreign:
        raise ConfigError(
            f"{target} is not empty and no model repository (it holds {', '.join(sorted(foreign)[:3])});"
            " choose another --repository"
        )
    if not force:
        raise ConfigError(
            f"{target} is a model repository that pageflight did not build; --force replaces all of it,"
            " or choose another --repository"
        )
    return empty


def engine_dir(root: Path, models: Sequence[ModelRecord], name: str, folder: str = FIRST_FOLDER) -> Path:
    """The engine directory `folder` of model `name` in a repository of `models`."""
    return root / engine_model_name(deployments(models)[name]) / folder


def engine_kept(
    root: Path, record: RepositoryRecord, wanted: ModelRecord, inputs: str, lowering: Lowering
) -> Path | None:
    """The engine directory that `wanted` can use as it is for an engine of these inputs; None when `lowering` must make
    it."""
    known = record.model(wanted.name)
    found = next((engine.folder for engine in known.engines if engine.inputs == inputs), None) if known else None
    if found is None:
        return None
    folder = engine_dir(root, record.models, wanted.name, found)
    try:
        manifest = EngineManifest.read(folder)
    except ManifestMismatch:
        return None
    if manifest.fingerprint != lowering.fingerprint(manifest.dtype):
        return None  # built by another version of the target's software, or on another kind of machine
    if wanted.serving.deterministic and not manifest.deterministic:
        return None  # nobody has looked yet whether it can be
    files = [(folder / item.path, item.num_bytes) for item in manifest.files]
    complete = all(path.is_file() and path.stat().st_size == size for path, size in files)
    return folder if complete else None


def unchanged(record: RepositoryRecord, wanted: ModelRecord) -> bool:
    """Would a build of `wanted` write what is there?"""
    known = record.model(wanted.name)
    return (
        known is not None
        and (known.engines, known.serving) == (wanted.engines, wanted.serving)
        and (known.default or not wanted.default)
        and _generated_digests(record.models) == record.generated
    )


def _generated_digests(models: Sequence[ModelRecord]) -> dict[str, str]:
    """What this version would generate: another version wrote files that know nothing of newer settings."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = [path for deployment in deployments(models).values() for path in write_repository(root, deployment)]
        return {path.relative_to(root).as_posix(): file_digest(path) for path in paths}


def deployments(models: Sequence[ModelRecord]) -> dict[str, Deployment]:
    """How each checkpoint of a repository appears in Triton. Raises ConfigError when two models would share a name."""
    placements, utilizations = placements_of(models), utilizations_of(models)
    made = {
        model.name: Deployment(
            name=model.name,
            engine_name=model.serving.engine_name,
            prefixed=len(models) > 1,
            is_default=model.default,
            engine_dir=FIRST_FOLDER,
            instances=len(parse_instances(model.serving.instances)),
            placements=placements[model.name],
            session_affinity=model.serving.session_affinity,
            reroute_after_s=model.serving.reroute_after_s,
            kv_memory=model.serving.kv_memory,
            host_kv_memory=model.serving.host_kv_memory,
            max_num_seqs=model.serving.max_num_seqs,
            max_num_tokens=model.serving.max_num_tokens,
            max_queue_size=model.serving.max_queue_size,
            max_queue_tokens=model.serving.max_queue_tokens,
            scheduling_policy=model.serving.scheduling_policy,
            ageing_s=model.serving.ageing_s,
            tenants=model.serving.tenants,
            kv_admission=model.serving.kv_admission,
            gpu_memory_utilization=utilizations[model.name],
            kv_watermark=model.serving.kv_watermark,
            target_inter_token_ms=model.serving.target_inter_token_ms,
            hang_limit_s=model.serving.hang_limit_s,
            num_threads=model.serving.threads,
            tensor_parallel=model.serving.tensor_parallel,
            pipeline_parallel=model.serving.pipeline_parallel,
            launcher=model.serving.launcher,
            nodes=model.serving.nodes,
            rank_port=model.serving.rank_port,
            rank_wait_s=model.serving.rank_wait_s,
            ray_address=model.serving.ray_address,
            prefix_cache=model.serving.prefix_cache,
            deterministic=model.serving.deterministic,
            exclude_input_in_output=model.serving.exclude_input_in_output,
            default_max_tokens=model.serving.default_max_tokens,
            response_rate=model.serving.response_rate,
        )
        for model in models
    }
    owners: dict[str, str] = {}
    for name, deployment in made.items():
        for triton_name in model_names(deployment).values():
            if triton_name in owners:
                raise ConfigError(
                    f"name={name!r}: its model {triton_name!r} has the same name as one of {owners[triton_name]!r};"
                    " choose another --name"
                )
            owners[triton_name] = name
    return made


class Assembly:
    """The next state of the repository at `target`, written to the new folder `root`."""

    def __init__(self, target: Path, record: RepositoryRecord, wanted: ModelRecord, *, force: bool) -> None:
        """Raises ConfigError when names clash, or when files edited by hand would be overwritten without `force`."""
        self._target, self._before, self._wanted = target, record, wanted
        self.models = record.with_model(wanted)
        self._deployments = deployments(self.models)
        edited = [] if force else record.edited_files(target)
        if edited:
            raise ConfigError(
                f"{target} has files that were changed by hand: {', '.join(edited[:4])}; this build would write them"
                " anew. Give your changes as options of the build, or overwrite them with --force"
            )

    def write(self, root: Path, artifacts: Mapping[str, Path]) -> str:
        """Write everything into `root`; `artifacts`, the engine directories of the wanted model by their place in its
        folder, are moved there."""
        generated: dict[str, str] = {}
        for name, deployment in self._deployments.items():
            for path in write_repository(root, deployment):
                generated[path.relative_to(root).as_posix()] = file_digest(path)
            own = root / engine_model_name(deployment)
            (own / FIRST_FOLDER).parent.mkdir(parents=True, exist_ok=True)
            if name == self._wanted.name:
                for folder, made in artifacts.items():
                    os.rename(made, own / folder)
                continue
            model = next(model for model in self.models if model.name == name)
            for folder in dict.fromkeys(engine.folder for engine in model.engines):
                link_or_copy(engine_dir(self._target, self._before.models, name, folder), own / folder)
        RepositoryRecord(models=self.models, generated=generated).write(root)
        names = sorted(path.parent.name for path in root.glob("*/config.pbtxt"))
        return f"{len(names)} models: {', '.join(names)}"
