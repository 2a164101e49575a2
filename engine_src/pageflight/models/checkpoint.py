"""A Hugging Face checkpoint on disk: safetensors, single or sharded, checked before a byte of weights is used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pageflight.core.errors import CheckpointError
from pageflight.models.config import DecoderConfig
from pageflight.models.families import Family, family_of, read_config
from pageflight.models.hf_entries import read_entries
from pageflight.models.safetensors_file import SafetensorsFile, TensorRecord
from pageflight.models.weights import WeightSpec, expected_shapes

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Checkpoint:
    """Tensors of a checkpoint folder by name, memory-mapped; nothing is copied until it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`. Raises CheckpointError when its weights are absent, damaged, sharded badly or pickles."""
        self.folder = folder
        self.files = _open_files(folder)
        self._owner: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.records:
                if name in self._owner:
                    raise CheckpointError(f"{name} is in both {self._owner[name].path} and {file.path}")
                self._owner[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._owner)

    def record(self, name: str) -> TensorRecord:
        return self._owner[name].records[name]

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as stored, a read-only view of the file; bf16 as uint16 bits."""
        return self._owner[name].array(name)

    def specs(self, config: DecoderConfig) -> tuple[WeightSpec, ...]:
        """The weights of `config`'s definition, proven to be here with the right shapes and dtypes, and nothing else.

        Raises CheckpointError naming the first tensors that are missing, misshapen, of an unsupported dtype or unknown.
        """
        family = family_of(config)
        specs = family.weights(config)
        assert {spec.name: spec.shape for spec in specs} == expected_shapes(config), "family and definition disagree"
        sources = [source for spec in specs for source in spec.sources]
        self._refuse_any("lacks tensors", [source.name for source in sources if source.name not in self])
        for source in sources:
            record = self.record(source.name)
            if record.shape != source.shape:
                raise CheckpointError(
                    f"{self.folder}: {source.name} has shape {list(record.shape)}, config.json asks for"
                    f" {list(source.shape)}"
                )
            if record.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{self.folder}: {source.name} has dtype {record.dtype}; supported are {', '.join(WEIGHT_DTYPES)}"
                )
        used = {source.name for source in sources}
        extra = [name for name in self.names if name not in used and not name.endswith(family.ignored)]
        if config.tied_head and family.tied_head in extra:
            self._check_tied(family, specs[0].sources[0].name)
            extra.remove(family.tied_head)
        self._refuse_any("holds tensors that this model family does not have", extra)
        return specs

    def _refuse_any(self, problem: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(f"{self.folder} {problem}: {', '.join(names[:5])}{more}")

    def _check_tied(self, family: Family, embedding: str) -> None:
        head, table = self.array(family.tied_head), self.array(embedding)
        step = max(1, (1 << 24) // max(1, table.shape[1]))
        same = head.dtype == table.dtype and head.shape == table.shape
        if not same or any((head[i : i + step] != table[i : i + step]).any() for i in range(0, len(table), step)):
            raise CheckpointError(
                f"{self.folder}: tie_word_embeddings=true, but {family.tied_head} differs from {embedding};"
                " set tie_word_embeddings to false if the head is its own"
            )


def open_checkpoint(folder: Path) -> tuple[DecoderConfig, Checkpoint]:
    """Read configuration and weights of a checkpoint folder and prove that they fit each other."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a checkpoint is a folder with config.json and safetensors")
    config = read_config(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.specs(config)
    return config, checkpoint


def _open_files(folder: Path) -> tuple[SafetensorsFile, ...]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return (SafetensorsFile(folder / _SINGLE),)
    if not index.is_file():
        raise CheckpointError(_no_weights(folder))
    entries = read_entries(index)
    placement = entries.data.get("weight_map")
    if not isinstance(placement, dict) or not all(isinstance(shard, str) for shard in placement.values()):
        raise CheckpointError(f"{index} is damaged: weight_map must name the file of each tensor")
    shards = sorted(set(placement.values()))
    outside = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
    if outside:
        raise CheckpointError(f"{index}: weight_map names {outside[0]!r}, which is no safetensors file of this folder")
    _refuse_missing(index, "files that are missing", [shard for shard in shards if not (folder / shard).is_file()])
    files = {shard: SafetensorsFile(folder / shard) for shard in shards}
    lost = [name for name, shard in placement.items() if name not in files[shard].records]
    _refuse_missing(index, "tensors that are not in their file", lost)
    return tuple(files.values())


def _refuse_missing(index: Path, problem: str, names: Iterable[str]) -> None:
    listed = list(names)
    if listed:
        raise CheckpointError(f"{index} names {problem}: {', '.join(listed[:5])}; fetch the checkpoint again")


def _no_weights(folder: Path) -> str:
    try:
        present = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    pickles = [name for name in present if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{folder} holds pickled weights ({', '.join(pickles[:3])}), which can run any code when they are opened"
            f" and are never read; convert them to {_SINGLE} first (save_pretrained of transformers writes it)"
        )
    return f"{folder} has neither {_SINGLE} nor {_INDEX}; supported are safetensors weights"
