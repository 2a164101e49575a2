"""Settings of several machines that cannot work are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.models.stages import check_nodes
from pageflight.runners.parallel import load_parallel
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import engines_of


def options(folder: Path, **serving: object) -> BuildOptions:
    common = {"tensor_parallel": 2, "pipeline_parallel": 2, "launcher": "external", "nodes": 2}
    return BuildOptions(
        checkpoint=folder,
        repository=folder,
        name="x",
        engine=EngineOptions(engine="torch"),
        serving=ServingOptions(**{**common, **serving}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("serving", "words"),
    [
        ({"nodes": 3}, r"nodes=3: must divide the 4 ranks \(tensor_parallel=2 x pipeline_parallel=2\)"),
        ({"nodes": 0}, "nodes=0: must be at least 1"),
        ({"launcher": "local"}, "nodes=2: launcher local starts ranks on this machine only; use external or ray"),
        ({"launcher": "mpi"}, "launcher='mpi': supported are local, ray, external"),
        ({"instances": "2"}, "instances=2: launcher external has one instance"),
        (
            {"instances": "gpu0,1", "pipeline_parallel": 1},
            "instances=gpu0,1: launcher external uses each machine's GPUs",
        ),
        (
            {"tensor_parallel": 1, "pipeline_parallel": 1, "nodes": 1},
            "launcher='external': there are no ranks to start",
        ),
        ({"rank_port": 65536}, "rank_port=65536: must be from 1 to 65535"),
        ({"rank_wait_s": 0}, "rank_wait_s=0: must be above 0"),
        ({"rank_wait_s": 1800}, "rank_wait_s=1800: must be above 0 and at most 1200"),
    ],
)
def test_a_build_refuses_what_cannot_work(tmp_path: Path, serving: dict[str, object], words: str) -> None:
    """The server found out, on the second machine, ten minutes later."""
    assert engines_of(options(tmp_path))
    with pytest.raises(ConfigError, match=words):
        engines_of(options(tmp_path, **serving))


def test_a_core_refuses_what_was_edited_before_it_starts_anything(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nodes=3: must divide the 4 ranks"):
        load_parallel(
            tmp_path,
            EngineConfig(tensor_parallel=4, launcher="external", num_nodes=3),
            num_threads=1,
            num_instances=1,
        )
    check_nodes(EngineConfig(tensor_parallel=8, pipeline_parallel=2, launcher="external", num_nodes=2))
