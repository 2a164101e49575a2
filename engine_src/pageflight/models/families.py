"""The registry of model families: a family is a reader of its configuration and a mapping of its tensor names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pageflight.core.errors import CheckpointError
from pageflight.models.config import DecoderConfig
from pageflight.models.hf_entries import Entries, read_entries
from pageflight.models.llama import llama_weights, read_llama
from pageflight.models.weights import WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that differ in names and constants only.

    `ignored` are endings of tensor names a checkpoint may carry that the definition does not read; `tied_head` is the
    tensor that repeats the embedding where the head is tied.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read_config: Callable[[Entries], DecoderConfig]
    weights: Callable[[DecoderConfig], tuple[WeightSpec, ...]]
    ignored: tuple[str, ...] = ()
    tied_head: str = "lm_head.weight"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architectures=("LlamaForCausalLM",),
            model_types=("llama",),
            read_config=read_llama,
            weights=llama_weights,
            ignored=(".rotary_emb.inv_freq",),
        ),
    )
}


def read_config(folder: Path) -> DecoderConfig:
    """Read the `config.json` of a checkpoint folder.

    Raises CheckpointError naming the entry, its value and what is supported.
    """
    entries = read_entries(folder / "config.json")
    if entries.data.get("quantization_config") or entries.data.get("compression_config"):
        name = "quantization_config" if entries.data.get("quantization_config") else "compression_config"
        raise entries.refuse(name, "quantised checkpoints are not supported; give the fp32, fp16 or bf16 original")
    if entries.data.get("auto_map"):
        raise entries.refuse("auto_map", "the checkpoint brings its own code, which is never run")
    architectures = entries.data.get("architectures")
    known = sorted(name for family in FAMILIES.values() for name in family.architectures)
    for family in FAMILIES.values():
        if isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in family.architectures:
            if entries.data.get("model_type") not in (None, *family.model_types):
                raise entries.refuse("model_type", f"{architectures[0]} goes with {', '.join(family.model_types)}")
            return family.read_config(entries)
    raise entries.refuse("architectures", f"supported are {', '.join(known)}")


def family_of(config: DecoderConfig) -> Family:
    """The family that `config` names. Raises CheckpointError for one this version does not have."""
    try:
        return FAMILIES[config.family]
    except KeyError:
        raise CheckpointError(f"family={config.family!r}: supported are {', '.join(sorted(FAMILIES))}") from None
