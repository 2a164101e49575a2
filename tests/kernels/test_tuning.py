from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton

from pageflight.kernels import tuning
from pageflight.kernels.tuning import Choice, Problem, Tiles

SMALL, LARGE = Tiles(block_t=16, block_n=16, block_k=32), Tiles(block_t=64, block_n=64, block_k=64, split_k=2)


class FakeCard:
    """Runs candidates in times that are given, or not at all; its clock is `timer`."""

    def __init__(self, times: dict[Tiles | None, float | Exception]) -> None:
        self.times = times
        self.launched: list[Tiles | None] = []

    def launch(self, tiles: Tiles | None) -> None:
        self.launched.append(tiles)
        if isinstance(time := self.times[tiles], Exception):
            raise time

    def timer(self, call: Callable[[], object]) -> float:
        call()
        time = self.times[self.launched[-1]]
        assert isinstance(time, float)
        return time

    def problem(self, key: str = "a") -> Problem:
        return Problem(key=key, candidates=tuple(self.times), launch=self.launch)


def test_the_fastest_is_chosen_and_of_equals_the_first() -> None:
    """A choice by the order of a set changes from run to run, and with it the rounding of sums."""
    card = FakeCard({None: 3.0, SMALL: 2.0, LARGE: 2.0})
    assert tuning.fastest(card.problem(), card.timer) == Choice(tiles=SMALL, microseconds=2.0)
    card = FakeCard({None: 1.0, SMALL: 2.0})
    assert tuning.fastest(card.problem(), card.timer).tiles is None


def test_what_does_not_fit_the_card_is_passed_over() -> None:
    """Tiles that a large card takes end in OutOfResources on a small one: that ended the whole measurement."""
    too_large = triton.OutOfResources(300_000, 101_376, "shared memory")
    card = FakeCard({LARGE: too_large, SMALL: 5.0})
    assert tuning.fastest(card.problem(), card.timer).tiles == SMALL
    with pytest.raises(ValueError, match="none of 1 candidates"):
        tuning.fastest(FakeCard({LARGE: too_large}).problem(), card.timer)


def test_an_error_of_the_device_is_none_of_a_candidate() -> None:
    """After an illegal address everything fails: what was measured then would be written down as true."""
    card = FakeCard({SMALL: RuntimeError("illegal memory access"), LARGE: 1.0})
    with pytest.raises(RuntimeError, match="illegal"):
        tuning.fastest(card.problem(), card.timer)


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    """A library that won is a choice too, not the lack of one."""
    first, second = FakeCard({None: 1.5, SMALL: 2.0}), FakeCard({LARGE: 4.25})
    problems = [first.problem("b"), second.problem("a")]
    timers = iter([first.timer, first.timer, second.timer])
    choices = tuning.tune(problems, gpu_name="NVIDIA X1", folder=tmp_path, timer=lambda call: next(timers)(call))
    assert choices == {"b": Choice(tiles=None, microseconds=1.5), "a": Choice(tiles=LARGE, microseconds=4.25)}
    assert tuning.read(tmp_path / "nvidia-x1.json") == choices
    tuning.write(tmp_path / "nvidia-x1.json", "NVIDIA X1", {"a": Choice(tiles=SMALL, microseconds=1.0)})
    assert tuning.read(tmp_path / "nvidia-x1.json")["a"].tiles == SMALL
    assert tuning.read(tmp_path / "nvidia-x1.json")["b"].tiles is None
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-x1.json"]


def test_an_interrupted_measurement_keeps_what_it_has(tmp_path: Path) -> None:
    card, broken = FakeCard({SMALL: 1.0}), FakeCard({SMALL: RuntimeError("unplugged")})
    with pytest.raises(RuntimeError):
        tuning.tune([card.problem("a"), broken.problem("b")], gpu_name="X", folder=tmp_path, timer=card.timer)
    assert set(tuning.read(tmp_path / "x.json")) == {"a"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"choices": 3}', '{"choices": {"a": {"tiles": {"block_t": 1}, "microseconds": 1}}}']
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: not a file of measured tiles"):
        tuning.read(tmp_path / "x.json")


def test_the_file_of_a_card_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards of one architecture differ in size; an unknown card and a CPU have nothing stored, which is no error."""
    name = "NVIDIA H100 80GB HBM3"
    path = tuning.file_of(name, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    tuning.write(path, name, {"a": Choice(tiles=SMALL, microseconds=1.0)})
    monkeypatch.setattr(tuning, "file_of", lambda gpu_name: tmp_path / Path(file_name(gpu_name)))
    names = {"cuda:0": name, "cuda:1": "NVIDIA Unknown"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    tuning.stored.cache_clear()
    assert tuning.stored(torch.device("cuda:0"))["a"].tiles == SMALL
    assert not tuning.stored(torch.device("cuda:1")) and not tuning.stored(torch.device("cpu"))
    tuning.stored.cache_clear()


def file_name(gpu_name: str) -> str:
    return "nvidia-h100-80gb-hbm3.json" if "H100" in gpu_name else "unknown.json"


@pytest.mark.parametrize(
    ("num_tokens", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (9000, 8192)]
)
def test_numbers_of_tokens_share_buckets(num_tokens: int, bucket: int) -> None:
    """T changes every step; N and K are the model's."""
    assert tuning.key_of("k", torch.bfloat16, num_tokens, 4096, 128) == f"k/bfloat16/t{bucket}/4096x128"


def test_files_that_are_shipped_can_be_read() -> None:
    assert all(tuning.read(path) for path in sorted(tuning.FOLDER.glob("*.json")))
