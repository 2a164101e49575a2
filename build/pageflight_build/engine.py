"""The engine directory: weights, tokenizer files and the manifest that describes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pageflight.core.errors import ConfigError
from pageflight.core.manifest import MANIFEST_NAME, EngineManifest, FileRecord
from pageflight.lowering.base import Lowering
from pageflight.models.checkpoint import Checkpoint, open_checkpoint
from pageflight.models.config import DecoderConfig
from pageflight.models.sharding import check_size
from pageflight.models.stages import check_engine, check_stages
from pageflight.quant.forms import check_group_size, default_group_size
from pageflight.quant.sharding import input_unit
from pageflight_build.checkpoint_files import TextFacts, read_text_facts
from pageflight_build.options import EngineOptions
from pageflight_build.target import chosen_dtype

_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A checkpoint that was read and found fit to be served."""

    folder: Path
    config: DecoderConfig
    weights: Checkpoint
    text: TextFacts


def read_source(folder: Path) -> Source:
    """Open and check everything of a checkpoint. Raises CheckpointError with the reason it cannot be served."""
    config, weights = open_checkpoint(folder)
    return Source(folder=folder, config=config, weights=weights, text=read_text_facts(folder, config))


def resolve_engine_options(options: EngineOptions, config: DecoderConfig, lowering: Lowering) -> EngineOptions:
    """Every open choice made: dtype for the target, cache dtype for that, the model's own length.

    Raises ConfigError when `max_model_len` is beyond what the model was made for, ConfigError or CheckpointError for
    what the target cannot run here.
    """
    dtype = chosen_dtype(options)
    kv_dtype = options.kv_dtype or lowering.default_kv_dtype(dtype)
    check_group_size(dtype, options.group_size)
    group_size = options.group_size or default_group_size(config, dtype)
    if options.max_model_len > config.max_positions:
        raise ConfigError(
            f"max_model_len={options.max_model_len}: the model was made for {config.max_positions} positions"
        )
    lowering.check(config, dtype, kv_dtype, group_size)
    return replace(
        options,
        dtype=dtype,
        group_size=group_size,
        kv_dtype=kv_dtype,
        max_model_len=options.max_model_len or config.max_positions,
    )


def check_ranks(
    tensor_parallel: int, pipeline_parallel: int, config: DecoderConfig, *, engine: str, dtype: str, group_size: int
) -> None:
    """Raises ConfigError, naming what works, where an engine cannot run on so many ranks."""
    check_engine(engine, tensor_parallel, pipeline_parallel)
    check_size(config, tensor_parallel, input_unit(dtype, group_size))
    check_stages(config, pipeline_parallel)


def make_manifest(
    name: str, source: Source, options: EngineOptions, lowering: Lowering, num_ranks: int = 1
) -> EngineManifest:
    """The manifest without its files. `options` must be resolved. `num_ranks`: that the engine is cut for."""
    assert options.dtype and options.kv_dtype and options.max_model_len, "options are resolved first"
    config, text = source.config, source.text
    return EngineManifest(
        name=name,
        family=config.family,
        lowering=options.engine,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        quant_group_size=options.group_size,
        block_size=lowering.block_size,
        max_model_len=options.max_model_len,
        vocab_size=config.vocab_size,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        pad_token_id=text.pad_token_id,
        add_bos=text.add_bos,
        model=config.to_json(),
        generation=text.generation,
        tensor_parallel=num_ranks,
        fingerprint=lowering.fingerprint(options.dtype),
    )


def record_files(folder: Path, advance: Callable[[int, int], None]) -> tuple[FileRecord, ...]:
    """Path, size and sha256 of every file of an engine directory but the manifest; `advance` counts bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    total = sum(path.stat().st_size for path in paths)
    done, records = 0, []
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                done += len(piece)
                advance(done, total)
        records.append(
            FileRecord(
                path=path.relative_to(folder).as_posix(), num_bytes=path.stat().st_size, sha256=digest.hexdigest()
            )
        )
    return tuple(records)
