"""Two servers for the whole session: one with a real engine, one with a slow fake engine and two instances."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from servers import Server, running_server
from tiny_checkpoint import make_tiny_checkpoint

from pageflight.loop.watch import Watch
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build
from pageflight_build.triton_config import Deployment, write_repository

NAME = "tiny"


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A built repository and the model's vocabulary size."""
    folder = tmp_path_factory.mktemp("served")
    vocab_size = make_tiny_checkpoint(folder / "checkpoint")
    options = BuildOptions(
        checkpoint=folder / "checkpoint",
        repository=folder / "repository",
        name=NAME,
        engine=EngineOptions(dtype="fp32"),
        serving=ServingOptions(kv_memory=16 << 20, max_num_seqs=32, default_max_tokens=16),
    )
    build(options)
    return folder / "repository", vocab_size


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine of `server` records everything that it is asked for."""
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="session")
def server(repository: tuple[Path, int], recordings: Path) -> Iterator[Server]:
    """The real thing: a tiny model in fp32, so that equal requests give equal text whatever runs beside them."""
    folder, vocab_size = repository
    watch = Watch(record=str(recordings / "run.rec"), check_invariants=1)
    with running_server(folder, NAME, vocab_size, watch=watch) as running:
        yield running


@pytest.fixture(scope="session")
def slow_server(repository: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two instances of an engine without a model, 20 ms a step: streams have a middle in which something can happen."""
    built, vocab_size = repository
    folder = tmp_path_factory.mktemp("slow") / "repository"
    deployment = Deployment(
        name=NAME,
        instances=2,
        max_num_seqs=4,
        max_queue_size=4,
        fake_engine=f'{{"kind":"checking","vocab_size":{vocab_size},"step_s":0.02}}',
    )
    write_repository(folder, deployment)
    artifacts = folder / "engine" / "1" / "artifacts"
    artifacts.symlink_to(built / "engine" / "1" / "artifacts", target_is_directory=True)
    with running_server(folder, NAME, vocab_size) as running:
        yield replace(running)
