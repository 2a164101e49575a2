"""`pageflight join` and the processes that it keeps: what they do when something is wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engines import make_checkpoint, make_engine
from joined import PAGEFLIGHT, config_of, free_port

from pageflight.cli.errors import CommandError
from pageflight.cli.joined_ranks import Joining, keep_joined
from pageflight.cli.main import main
from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import manifest_digest
from pageflight.models.stages import Place
from pageflight.ranks.listener import RankListener, RemoteRank
from pageflight.ranks.messages import Failed, Present, RankSpec, decode_from_rank, encode
from pageflight.ranks.process_group import open_store, reach_store
from pageflight.runners import parallel
from pageflight.runners.engine_copies import own_copy

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "torch")


@pytest.fixture
def leader() -> Iterator[RankListener]:
    """Which expects rank 1."""
    listening = RankListener([1], os.environ["PAGEFLIGHT_RANK_KEY"].encode(), host=HOST)
    yield listening
    listening.close()


def spec_of(engine: Path, port: int = 1, **changes: object) -> RankSpec:
    values = {
        "engine_dir": str(engine),
        "manifest_digest": manifest_digest(engine),
        "config": config_of(port, pipeline_parallel=2),
        "place": Place(rank=1, pipeline_parallel=2),
        "device": "cpu",
        "host": HOST,
        "port": port,
        "num_threads": 1,
        "num_instances": 1,
    }
    return RankSpec(**{**values, **changes})  # type: ignore[arg-type]


def joining(engine: Path, port: int, rank: int = 1, timeout_s: float = 30.0) -> Joining:
    return Joining(engine_dir=engine, leader=(HOST, port), devices={rank: 0}, leader_timeout_s=timeout_s)


def test_a_joining_machine_gives_up_with_the_reason(
    engine: Path, leader: RankListener, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It stayed up and looked well, for ever: no leader, a number that nobody expects, the key of another model."""
    with pytest.raises(CommandError, match="rank 1 has found no leader that takes it"):
        keep_joined(joining(engine, free_port(), timeout_s=0.2), print)
    assert ": Connection refused" in capfd.readouterr().err
    with pytest.raises(CommandError, match="rank 5 was refused"):
        keep_joined(joining(engine, leader.port, rank=5), print)
    assert "rank 5 does not dial in: rank 1 of this model do" in capfd.readouterr().err
    monkeypatch.setenv("PAGEFLIGHT_RANK_KEY", "the key of another model")
    with pytest.raises(CommandError, match="rank 1 has found no leader that takes it"):
        keep_joined(joining(engine, leader.port, timeout_s=0.2), print)
    assert "for 0.2 s: the leader has another key" in capfd.readouterr().err


def test_join_ends_at_once_when_it_is_told_to_and_nothing_is_left(engine: Path, leader: RankListener) -> None:
    """A pod was killed after its grace, and its ranks with it half a minute later."""
    command = [sys.executable, "-c", PAGEFLIGHT, "join", str(engine), f"--leader={HOST}:{leader.port}"]
    command += ["--node-rank=1", "--ranks-per-node=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    leader.wait(60, lambda missing: None)
    (child,) = psutil.Process(process.pid).children()
    assert os.environ["PAGEFLIGHT_RANK_KEY"] not in " ".join(child.cmdline()), "everybody on a machine reads those"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and f"joining {HOST}:{leader.port} as rank 1" in errors
    assert not child.is_running()


def rejoined(engine: Path, leader: RankListener, spec: RankSpec) -> tuple[RemoteRank, threading.Thread]:
    """A joined rank that has been told `spec`."""

    def keep() -> None:
        with pytest.raises(KeyboardInterrupt):
            keep_joined(joining(engine, leader.port), told)

    def told(words: str) -> None:
        raise KeyboardInterrupt(words)

    thread = threading.Thread(target=keep)
    thread.start()
    (rank,) = leader.wait(60, lambda missing: None)
    rank.line.send_bytes(encode(spec))
    return rank, thread


def test_a_machine_without_the_engine_says_so_to_both_sides(engine: Path, leader: RankListener) -> None:
    """It computed with the weights of last week."""
    rank, thread = rejoined(engine, leader, spec_of(engine, manifest_digest="of another"))
    failed = decode_from_rank(rank.line.recv_bytes())
    assert isinstance(failed, Failed) and failed.error == "ManifestMismatch"
    assert failed.message.startswith("rank 1 on ") and f": {engine} has another engine than" in failed.message
    thread.join()


def test_a_copy_of_the_weights_with_a_wrong_byte_is_found_on_its_own_machine(
    engine: Path, tmp_path: Path, leader: RankListener
) -> None:
    """The first rank hashes files for all, but those of another machine it does not see."""
    copy = shutil.copytree(engine, tmp_path / "copy")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    store, port = open_store(HOST)
    rank, thread = rejoined(copy, leader, spec_of(engine, port))
    assert decode_from_rank(rank.line.recv_bytes()) == Present()
    first = Place(rank=0, pipeline_parallel=2)
    communicator = parallel.GroupCommunicator(first, store, parallel._device(first, 0), HOST)
    runner, _ = parallel._load(spec_of(engine, port, place=first), communicator, parallel._device(first, 0))
    failed = decode_from_rank(rank.line.recv_bytes())
    assert isinstance(failed, Failed) and "was changed after the build (sha256 differs)" in failed.message
    runner.close()
    communicator.close(is_whole=False)
    thread.join()


def test_a_port_that_no_other_machine_reaches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank port was open and no other: both machines waited for half an hour, without a word."""
    with pytest.raises(
        ConfigError, match=r"cannot reach the first rank's port \d+ at 127\.0\.0\.1: Connection refused"
    ):
        reach_store(HOST, free_port())


def test_a_rank_that_waits_for_what_never_comes_ends_with_its_line(engine: Path, leader: RankListener) -> None:
    """The leader was killed, and its ranks waited half an hour for the others: nobody could start it again."""
    store, port = open_store(HOST)
    rank, thread = rejoined(engine, leader, spec_of(engine, port))
    assert decode_from_rank(rank.line.recv_bytes()) == Present()
    leader.close()
    thread.join(60)
    assert not thread.is_alive()
    del store  # was there all the time, and without a first rank


def test_an_engine_is_found_in_a_repository_by_what_it_is(engine: Path, tmp_path: Path) -> None:
    """Two models in a repository, which lies elsewhere on this machine."""
    for name, title in (("a_engine", "other"), ("engine", "tiny")):
        folder = tmp_path / name / "1" / "artifacts"
        shutil.copytree(engine, folder)
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"tiny"', f'"{title}"'))
    assert own_copy(spec_of(engine), tmp_path).engine_dir == str(tmp_path / "engine" / "1" / "artifacts")
    assert own_copy(spec_of(engine), None).engine_dir == str(engine)
    with pytest.raises(ManifestMismatch, match=f"{tmp_path / 'none'} has no engine; copy the repository"):
        own_copy(spec_of(engine), tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--leader=a", "--node-rank=1"], "is an engine, and no repository that says more: give --ranks-per-node"),
        (["--leader=a:x", "--node-rank=1", "--ranks-per-node=1"], "leader='a:x': must be HOST or HOST:PORT"),
    ],
)
def test_wrong_usage_is_named(
    engine: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["join", str(engine), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_machine_without_a_key_or_an_engine_joins_nobody(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--leader=a", "--node-rank=1", "--ranks-per-node=1"]
    assert main(["join", str(tmp_path), *good]) == 1
    assert "has no engine with launcher external" in capsys.readouterr().err
    monkeypatch.setenv("PAGEFLIGHT_RANK_GONE_S", "never")
    assert main(["join", str(engine), *good]) == 1
    assert "PAGEFLIGHT_RANK_GONE_S='never': must be a whole number" in capsys.readouterr().err
    monkeypatch.delenv("PAGEFLIGHT_RANK_KEY")
    assert main(["join", str(engine), *good]) == 1
    assert "PAGEFLIGHT_RANK_KEY is not set" in capsys.readouterr().err
