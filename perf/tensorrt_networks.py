"""Our networks for polygraphy: every segment in every precision, by name.

    POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert perf/tensorrt_networks.py:mid_fp8 \\
        --model-type trt-network-script --convert-to trt --compute-capabilities 8.9 12.0 -o mid.engine
    POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy inspect model perf/tensorrt_networks.py:last_int4 \\
        --model-type trt-network-script --show layers

The name is a segment (first, mid, last) and a precision. Neither command needs a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorrt_rtx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and polygraphy runs this file

from pageflight.lowering.tensorrt_build import Networks, lower
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.quant.forms import DTYPES, default_group_size, weight_forms
from perf.gpu_check.tensorrt_models import SMALL

sys.modules.setdefault("tensorrt", tensorrt_rtx)  # polygraphy 0.53.6 asks for it by name when it prints a network
_SEGMENTS = ("first", "mid", "last")
_kept: list[Networks] = []  # a network is gone when its builder is


def __getattr__(name: str) -> Callable[[], tuple[Any, Any]]:
    segment, _, dtype = name.partition("_")
    if segment not in _SEGMENTS or dtype not in DTYPES:
        raise AttributeError(f"{name}: it is SEGMENT_DTYPE, of {', '.join(_SEGMENTS)} and {', '.join(DTYPES)}")

    def load() -> tuple[Any, Any]:
        """Builder and network, as polygraphy wants them."""
        networks = lower(
            tensorrt_rtx,
            SMALL,
            weight_forms(SMALL, dtype, default_group_size(SMALL, dtype)),
            activations=TensorRtLowering().activations(dtype),
            num_positions=SMALL.max_positions,
        )
        _kept.append(networks)
        return networks.builder, networks.segments[segment].definition

    return load
