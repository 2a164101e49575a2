"""GPUs as their makers publish them, and how a command line names them.

Memory is what the driver reports (nvidia-smi), a little less than the name says. Bandwidth and rates are those of
NVIDIA's data sheets, without sparsity and with float32 sums: H100 and H200 Tensor Core GPU, HGX B200, GB200 NVL72,
A100, A10, L4 and L40S data sheets; Ada and RTX Blackwell architecture white papers for the RTX cards. Slices: the
Multi-Instance GPU user guide, memory and multiprocessors as `nvidia-smi mig -lgip` lists them (of H200's quarters no
listing was at hand: their memory is in proportion to the others).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pageflight.core.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30
Kind = Literal["gpu", "slice", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What computes for one rank. None: not known. `capability` 89 is compute capability 8.9.

    Several GPUs can share a model; a slice of a GPU works alone, for slices do not reach each other's memory. `source`:
    where the memory is known from, if not from the data sheet. `has_bf16`: multiplies bf16 numbers itself.
    """

    name: str
    kind: Kind
    memory_bytes: int
    bandwidth_bytes_s: float | None = None
    bf16_flops_s: float | None = None
    fp8_flops_s: float | None = None
    capability: int | None = None
    source: str = ""
    has_bf16: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """So many cards of one kind, shared alike by `num_machines`; 0: nobody has said how many these are."""

    count: int
    card: Card
    num_machines: int = 0


_GPUS = (  # name with the memory of the data sheet, MiB, GB/s, bf16 and fp8 in 10^12 operations a second, capability
    ("A10-24", 23028, 600, 125.0, None, 86),
    ("A100-40", 40960, 1555, 312.0, None, 80),
    ("A100-80", 81920, 2039, 312.0, None, 80),
    ("B200-180", 183359, 7700, 2250.0, 4500.0, 100),
    ("GB200-186", 189471, 8000, 2500.0, 5000.0, 100),
    ("H100-80", 81559, 3350, 989.4, 1978.9, 90),
    ("H100-94", 95830, 3938, 835.5, 1670.9, 90),
    ("H200-141", 143771, 4800, 989.4, 1978.9, 90),
    ("L4-24", 23034, 300, 121.0, 242.5, 89),
    ("L40S-48", 46068, 864, 362.0, 733.0, 89),
    ("RTX-4090-24", 24564, 1008, 165.2, 330.3, 89),
    ("RTX-5090-32", 32607, 1792, 209.5, 419.0, 120),
    ("RTX-6000-Ada-48", 49140, 960, 364.2, 728.5, 89),
    ("RTX-PRO-6000-96", 97887, 1792, 503.8, 1007.6, 120),
)

_SLICES = {  # multiprocessors of the whole; per profile GiB, eighths of the bandwidth, multiprocessors
    "A100-40": (108, {"1g.5gb": (4.75, 1, 14), "1g.10gb": (9.62, 2, 14), "2g.10gb": (9.62, 2, 28),
                      "3g.20gb": (19.5, 4, 42), "4g.20gb": (19.5, 4, 56)}),
    "A100-80": (108, {"1g.10gb": (9.5, 1, 14), "1g.20gb": (19.5, 2, 14), "2g.20gb": (19.5, 2, 28),
                      "3g.40gb": (39.25, 4, 42), "4g.40gb": (39.25, 4, 56)}),
    "H100-80": (132, {"1g.10gb": (9.75, 1, 16), "1g.20gb": (19.62, 2, 26), "2g.20gb": (19.62, 2, 32),
                      "3g.40gb": (39.5, 4, 60), "4g.40gb": (39.5, 4, 64)}),
    "H100-94": (132, {"1g.12gb": (10.62, 1, 16), "1g.24gb": (21.5, 2, 26), "2g.24gb": (21.5, 2, 32),
                      "3g.47gb": (46.12, 4, 60), "4g.47gb": (46.12, 4, 64)}),
    "H200-141": (132, {"1g.18gb": (16.0, 1, 16), "1g.35gb": (32.5, 2, 26), "2g.35gb": (32.5, 2, 32),
                       "3g.71gb": (69.5, 4, 60), "4g.71gb": (69.5, 4, 64)}),
}  # fmt: skip


def _known_cards() -> dict[str, Card]:
    found = {}
    for name, mebibytes, bandwidth, bf16, fp8, capability in _GPUS:
        found[name] = whole = Card(
            name=name,
            kind="gpu",
            memory_bytes=mebibytes * MIB,
            bandwidth_bytes_s=bandwidth * 1e9,
            bf16_flops_s=bf16 * 1e12,
            fp8_flops_s=None if fp8 is None else fp8 * 1e12,
            capability=capability,
        )
        num_sms, profiles = _SLICES.get(name, (1, {}))
        for profile, (gibibytes, eighths, sms) in profiles.items():
            part = sms / num_sms
            found[f"{name}/{profile}"] = replace(
                whole,
                name=f"{name}/{profile}",
                kind="slice",
                memory_bytes=int(gibibytes * GIB),
                bandwidth_bytes_s=bandwidth * 1e9 * eighths / 8,
                bf16_flops_s=bf16 * 1e12 * part,
                fp8_flops_s=None if fp8 is None else fp8 * 1e12 * part,
            )
    return found


KNOWN = _known_cards()
_SPEC = re.compile(r"(?:([0-9]+)x)?(?:([0-9]+)x)?([^@]+?)(?:@([0-9.]+)([GT])B/s)?", re.IGNORECASE)
_SIZE = re.compile(r"([0-9.]+)GiB", re.IGNORECASE)


def parse_cards(text: str, cpu: Callable[[], Card]) -> Cards:
    """Cards of "2xH100-94", "2x8xH100-80" (two machines), "L4", "1g.12gb", "2x80GiB@3350GB/s" or "cpu@40GB/s". `cpu`
    describes this machine.

    A bandwidth after @ replaces the published one. Raises ConfigError naming what is known.
    """
    match = _SPEC.fullmatch(text.strip())
    if not match:
        raise _unknown(text)
    num_machines = int(match[1]) if match[2] else 0
    count = int(match[2] or match[1] or 1) * (num_machines if match[2] else 1)
    if not 1 <= count <= 1024:
        raise ConfigError(f"gpus={text!r}: the number of cards must be from 1 to 1024")
    name, size = match[3].strip(), _SIZE.fullmatch(match[3].strip())
    if name.lower() == "cpu":
        if count > 1:
            raise ConfigError(f"gpus={text!r}: there is one cpu, this machine's")
        card = cpu()
    elif size:
        if not match[4]:
            raise ConfigError(f"gpus={text!r}: memory alone says nothing of speed; write {name}@3350GB/s")
        card = Card(name=name, kind="gpu", memory_bytes=_positive(text, size[1], GIB))
    else:
        card = _find(text, name)
    if num_machines and card.kind == "slice":
        raise ConfigError(f"gpus={text!r}: slices work alone, on no machine together")
    if match[4]:
        bandwidth = _positive(text, match[4], 10**9 if match[5].upper() == "G" else 10**12)
        card = replace(card, bandwidth_bytes_s=float(bandwidth))
    return Cards(count=count, card=card, num_machines=num_machines)


def _positive(text: str, number: str, unit: int) -> int:
    try:
        value = int(float(number) * unit)
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigError(f"gpus={text!r}: {number!r} is no amount above 0")
    return value


def _find(text: str, wanted: str) -> Card:
    """By the whole name, by the name without the memory, or a slice by its profile, where only one card has it."""
    name = re.sub(r"[\s_]+", "-", wanted).lower()
    found = [card for known, card in KNOWN.items() if known.lower() == name]
    if not found:
        whole = [card for card in KNOWN.values() if card.kind == "gpu"]
        found = [card for card in whole if card.name.lower().rpartition("-")[0] == name]
    if not found:
        found = [card for known, card in KNOWN.items() if known.partition("/")[2] == name]
    if len(found) > 1:
        raise ConfigError(f"gpus={text!r}: there are several; write {' or '.join(card.name for card in found)}")
    if not found:
        raise _unknown(text)
    return found[0]


def _unknown(text: str) -> ConfigError:
    whole = ", ".join(name for name, card in KNOWN.items() if card.kind == "gpu")
    sliced = ", ".join(name for name, card in KNOWN.items() if card.kind == "slice")
    return ConfigError(
        f"gpus={text!r}: known are {whole}, their slices ({sliced}) and cpu; others by memory and bandwidth, such as"
        " 2x80GiB@3350GB/s"
    )
