"""What a core says of a Ray cluster that is not there, has no room, or loses its ranks. Without Ray's processes."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError, RankLost, RanksMissing
from pageflight.models.stages import Place
from pageflight.ranks import ray_launcher
from pageflight.ranks.launcher import Ended
from pageflight.ranks.launchers import open_launcher
from pageflight.ranks.listener import RankListener
from pageflight.ranks.ray_launcher import VISIBLE, dialled_in, index_of_gpu, shared_environment
from pageflight.ranks.ray_line import RayLine
from pageflight.ranks.ray_messages import Machine, Placed, Start, Wanted, shortage

WANTED = Wanted(address="127.0.0.1:1", num_nodes=2, ranks_per_node=8, resource="GPU", amount=1, wait_s=1.0)
CONFIG = EngineConfig(tensor_parallel=2, launcher="ray", num_nodes=2, ray_address="127.0.0.1:1", rank_wait_s=1.0)
PLACES = (Place(rank=1, tensor_parallel=2),)


def test_what_is_missing_is_told_in_the_terms_of_the_wish() -> None:
    """Ray's own answer was an identifier and the word PENDING."""
    machines = [Machine("10.0.0.1", 8.0, 8.0), Machine("10.0.0.2", 8.0, 3.0), Machine("10.0.0.3", 0.0, 0.0)]
    assert shortage(WANTED, "10.0.0.1", machines) == (
        "wanted are 2 machines, this one (10.0.0.1) among them, with 8 GPU free each; the Ray cluster has 10.0.0.1 with"
        " 8 of 8 GPU free, 10.0.0.2 with 3 of 8 GPU free, 10.0.0.3 with 0 of 0 GPU free"
    )


@pytest.mark.parametrize(
    ("gpu", "visible", "index"), [("3", None, 3), ("3", "1,3", 1), ("GPU-b", "GPU-a, GPU-b", 1), ("0", "0", 0)]
)
def test_the_gpu_of_the_first_rank_is_found_among_those_that_it_sees(gpu: str, visible: str | None, index: int) -> None:
    assert index_of_gpu(gpu, {} if visible is None else {VISIBLE: visible}) == index


@pytest.mark.parametrize("visible", ["0,1", "", "GPU-a"])
def test_a_gpu_that_the_core_does_not_see_is_refused(visible: str) -> None:
    """It would have computed on one that Ray had given to another rank."""
    with pytest.raises(ConfigError, match=f"Ray gives GPU 2 to the first rank, which sees {VISIBLE}='{visible}'"):
        index_of_gpu("2", {VISIBLE: visible})


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    launcher = open_launcher(CONFIG, print)
    with pytest.raises(ConfigError, match=r"launcher='ray': Ray is not installed; pip install 'pageflight\[ray\]'"):
        launcher.start(PLACES)
    launcher.close()


def test_no_cluster_is_an_error_after_the_limit() -> None:
    """Ray itself tries an address for minutes, and ends the process then."""
    told: list[str] = []
    launcher = open_launcher(CONFIG, told.append)
    with pytest.raises(
        RanksMissing, match=r"no Ray cluster at ray_address='127.0.0.1:1' within rank_wait_s=1: .*refused"
    ):
        launcher.start(PLACES)
    launcher.close()


def test_a_driver_that_dies_is_the_end_of_all_ranks_and_no_streams_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may abort the process that is its client: nobody would have told the core."""
    program = tmp_path / "driver"
    program.write_text("#!/bin/sh\nsleep 1\nkill -ABRT $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    line, called = RayLine(WANTED, print), []
    line.on_over(9, lambda: called.append(9))
    with pytest.raises(RankLost, match=r"the core's Ray driver ended \(signal 6\)") as caught:
        line.placed()
    assert caught.value.return_code == -signal.SIGKILL
    ended = line.over(15, wait_s=60.0)
    assert ended == Ended(words="the core's Ray driver ended (signal 6)", return_code=-signal.SIGKILL)
    line.on_over(10, lambda: called.append(10))
    line.close()
    assert called == [9, 10]


class EndedRanks:
    """A driver that knows of one rank that it has ended."""

    def over(self, rank: int) -> Ended | None:
        return Ended(words="exit status 3", return_code=3) if rank == 2 else None


def test_a_rank_that_ends_before_it_dials_in_is_not_waited_for() -> None:
    """A machine without the package was waited for until the limit, which then said that a rank had not come."""
    addresses = {1: "10.0.0.1", 2: "10.0.0.2"}
    for expected, error, message in (
        ([1, 2], RankLost, r"rank 2 on 10.0.0.2 ended before it dialled in \(exit status 3\)"),
        ([1], RanksMissing, "rank 1 did not dial in"),
    ):
        listener = RankListener(expected, b"a key of this test", host="127.0.0.1")
        wait_s = 600.0 if error is RankLost else 0.1
        there = {rank: addresses[rank] for rank in expected}
        with pytest.raises(error, match=message):
            dialled_in(listener, EndedRanks(), there, wait_s)  # type: ignore[arg-type]
        listener.close()


def test_settings_of_what_ranks_say_to_each_other_go_to_all_machines() -> None:
    """NCCL ran with the leader's settings on one machine and with none on the other, and did not meet."""
    alike = {"NCCL_IB_DISABLE": "1", "TORCH_NCCL_X": "2", "GLOO_X": "3", "PAGEFLIGHT_RANK_GONE_S": "4"}
    own = {"NCCL_SOCKET_IFNAME": "eth7", "GLOO_SOCKET_IFNAME": "eth7", "NCCL_IB_HCA": "mlx5_7"}
    assert shared_environment({**alike, **own, "PATH": "/bin", "PAGEFLIGHT_RANK_KEY": "x"}) == alike


class PlacedDriver:
    """A driver with room on machines of these addresses, whose ranks end at once."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses
        self.sent: list[object] = []

    def placed(self) -> Placed:
        return Placed(self._addresses)

    def send(self, message: object) -> None:
        self.sent.append(message)

    def over(self, rank: int, wait_s: float = 0.0) -> Ended:
        return Ended(words="enough", return_code=0)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        (("::1", "::1"), "Ray knows this machine by ::1: ranks need IPv4"),
        (("192.0.2.1", "192.0.2.2"), "ranks cannot dial in to 192.0.2.1, Ray's address of this machine: "),
    ],
)
def test_an_address_that_nobody_can_dial_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...], words: str
) -> None:
    """The error spoke of a rank_port, which nobody had given."""
    monkeypatch.setattr(ray_launcher, "RayLine", lambda wanted, progress: PlacedDriver(*addresses))
    launcher = open_launcher(CONFIG, print)
    with pytest.raises(ConfigError, match=words) as caught:
        launcher.start(PLACES)
    assert "rank_port" not in str(caught.value)


def test_the_first_rank_of_each_other_machine_hashes_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Ray nobody did: a copy with a wrong byte served."""
    driver = PlacedDriver("127.0.0.1", "127.0.0.2")
    monkeypatch.setattr(ray_launcher, "RayLine", lambda wanted, progress: driver)
    config = EngineConfig(tensor_parallel=4, launcher="ray", num_nodes=2, ray_address="127.0.0.1:1", rank_wait_s=1.0)
    launcher = open_launcher(config, print)
    with pytest.raises(RankLost, match="enough"):
        launcher.start([Place(rank=rank, tensor_parallel=4) for rank in (1, 2, 3)])
    launcher.close()
    (start,) = driver.sent
    assert isinstance(start, Start)
    assert {rank for rank, command in start.commands.items() if "--verify" in command} == {2}
