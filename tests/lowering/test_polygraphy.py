"""NVIDIA's polygraphy reads and builds our networks as it is told to in docs/tensorrt.md, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def polygraphy(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("polygraphy")), *arguments, "--model-type", "trt-network-script"]
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("network", ["first_bf16", "mid_fp8", "last_int4"])
def test_polygraphy_builds_our_networks(network: str, tmp_path: Path) -> None:
    """A network that lives by what our own builder keeps alive beside it builds for nobody else."""
    engine = tmp_path / "made.engine"
    script = f"perf/tensorrt_networks.py:{network}"
    said = polygraphy(
        "convert", script, "--convert-to", "trt", "--compute-capabilities", "8.9", "12.0", "-o", str(engine)
    )
    assert "Finished engine building" in said and engine.stat().st_size > 100_000


def test_polygraphy_shows_our_networks() -> None:
    """It printed nothing but that `tensorrt` is not installed."""
    said = polygraphy("inspect", "model", "perf/tensorrt_networks.py:mid_int4", "--show", "layers")
    for line in (
        "Strongly Typed Network",
        "this.down [dtype=int4, shape=(1024, 2816)]",
        "this.down.scale [dtype=float32, shape=(1024, 22)]",
        "next_residual [dtype=bfloat16, shape=(-1, 1024)]",
        "[Op: LayerType.ROTARY_EMBEDDING]",
    ):
        assert line in said, line
