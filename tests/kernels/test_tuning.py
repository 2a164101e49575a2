from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton

from pageflight.kernels import attention_mixed, attention_tuning, gemm_fp8, gemm_int, timing, tuning
from pageflight.kernels.attention_decode import SplitWorkspace
from pageflight.kernels.tuning import AnyTiles, AttentionTiles, Choice, Problem, Tiles
from pageflight.lowering.device_weight import DeviceWeight

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


@pytest.mark.parametrize("message", ["PassManager::run failed", "CUDA out of memory", "scaled_mm: shape not supported"])
def test_what_no_compiler_or_library_takes_is_passed_over(message: str) -> None:
    """One candidate on which the compiler failed ended the measurement, at every later run again."""
    card = FakeCard({None: RuntimeError(message), SMALL: 5.0})
    assert tuning.fastest(card.problem(), card.timer).tiles == SMALL


def test_an_error_of_the_device_is_none_of_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal address everything fails: what was measured then would be written down as true."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken_card)
    card = FakeCard({SMALL: RuntimeError("illegal memory access"), LARGE: 1.0})
    with pytest.raises(RuntimeError, match="nothing runs any more"):
        tuning.fastest(card.problem(), card.timer)


def broken_card() -> None:
    raise RuntimeError("nothing runs any more")


def test_a_kernel_is_timed_without_what_empties_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the host: a call that launches two kernels was slower than one that takes longer."""
    launched: list[float] = []
    costs = {"flush": 40e-6, "call": 5e-6}

    def graph_seconds(call: Callable[[], object], device: torch.device) -> float:
        launched.clear()
        call()
        return sum(launched)

    monkeypatch.setattr(timing, "graph_seconds", graph_seconds)
    monkeypatch.setattr(timing, "flusher", lambda device: lambda: launched.append(costs["flush"]))
    device = torch.device("cuda", 77)  # what was measured of a card is kept
    assert timing.cold_seconds(lambda: launched.append(costs["call"]), device) == pytest.approx(5e-6)
    assert timing.cold_seconds(lambda: None, device) > 0, "noise makes a time of nothing, or less"


def test_a_timed_call_allocates_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates with splits were charged for an allocation that no served step makes."""
    made: list[int] = []
    right = SplitWorkspace.empty

    def empty(*arguments: Any) -> SplitWorkspace:
        made.append(arguments[2])
        return right(*arguments)

    monkeypatch.setattr(attention_tuning.SplitWorkspace, "empty", empty)
    kinds, sizes = (torch.float32, torch.float32), (2, 1, 16)
    problem = attention_tuning.decode_problem(*kinds, 1, *sizes, 32, num_sms=4, device=torch.device("cpu"))
    for splits in (2, 3, 2, 3):
        problem.launch(AttentionTiles(keys=16, num_splits=splits))
    assert made == [2, 3]


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    """A library that won is a choice too, not the lack of one."""
    first, second = FakeCard({None: 1.5, SMALL: 2.0}), FakeCard({LARGE: 4.25})
    problems = [first.problem("b"), second.problem("a")]
    timers = iter([first.timer, first.timer, second.timer])
    timer = lambda call: next(timers)(call)  # noqa: E731
    choices = dict(tuning.tune(problems, gpu_name="NVIDIA X1", folder=tmp_path, timer=timer))
    assert choices == {"b": Choice(tiles=None, microseconds=1.5), "a": Choice(tiles=LARGE, microseconds=4.25)}
    assert tuning.read(tmp_path / "nvidia-x1.json") == choices
    tuning.write(tmp_path / "nvidia-x1.json", "NVIDIA X1", {"a": Choice(tiles=SMALL, microseconds=1.0)})
    assert tuning.read(tmp_path / "nvidia-x1.json")["a"].tiles == SMALL
    assert tuning.read(tmp_path / "nvidia-x1.json")["b"].tiles is None
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-x1.json"]


def test_an_interrupted_measurement_keeps_what_it_has(tmp_path: Path) -> None:
    card, broken = FakeCard({SMALL: 1.0}), FakeCard({SMALL: triton.OutOfResources(2, 1, "shared memory")})
    with pytest.raises(ValueError, match="none of 1"):
        list(tuning.tune([card.problem("a"), broken.problem("b")], gpu_name="X", folder=tmp_path, timer=card.timer))
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


@pytest.fixture
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, AnyTiles]], None]]:
    """Writes the file of a card that this machine's processor takes itself for."""
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Fake X9")
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)

    def write(tiles: dict[str, AnyTiles]) -> None:
        choices = {key: Choice(tiles=each, microseconds=1.0) for key, each in tiles.items()}
        tuning.write(tuning.file_of("Fake X9"), "Fake X9", choices)

    tuning.stored.cache_clear()
    yield write
    tuning.stored.cache_clear()


class Spy:
    """Stands for a kernel and keeps the grids and constants of its launches."""

    def __init__(self, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[dict[str, Any]] = []
        self._kernel = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            self.launches.append({"grid": grid, **constants})
            self._kernel[grid](*arguments, **constants)

        return launch


OTHER = Tiles(block_t=32, block_n=16, block_k=16, split_k=2, num_warps=8, num_stages=1)


@pytest.mark.parametrize("form", ["F8_E4M3", "I8", "I4"])
def test_a_weight_is_multiplied_as_was_measured_on_the_card(
    form: str, fake_gpu: Callable[[dict[str, AnyTiles]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is written one way and looked up in another leaves every measurement unused, in silence."""
    kernels = {"F8_E4M3": (gemm_fp8, gemm_fp8.KERNEL), "I8": (gemm_int, "gemm_int8"), "I4": (gemm_int, "gemm_int4")}
    module, kernel = kernels[form]
    x, codes = torch.randn(3, 64), torch.randint(-7, 8, (48, 64), dtype=torch.int8)
    values = {"F8_E4M3": codes.float().to(torch.float8_e4m3fn), "I8": codes, "I4": gemm_int.pack_int4(codes)}[form]
    scales = torch.ones(48) if form == "F8_E4M3" else torch.ones(48, 1)
    weight = DeviceWeight(form, values, scales)
    spy = Spy(module, "_gemm_fp8_kernel" if form == "F8_E4M3" else "_gemm_int_kernel", monkeypatch)
    expected = weight.product(x, None)
    sizes = (48, 64) if form == "F8_E4M3" else (48, 64, 64)
    fake_gpu({tuning.key_of(kernel, torch.float32, 3, *sizes): OTHER})
    torch.testing.assert_close(weight.product(x, None), expected, rtol=1e-4, atol=1e-4)
    before, after = spy.launches
    found = {name: after[name.upper()] for name in ("block_t", "block_n", "split_k")}
    assert found == {"block_t": 32, "block_n": 16, "split_k": 2} and after["num_warps"] == 8
    assert {name: before[name.upper()] for name in found} != found, "the choice must differ from the default"
    assert after["BLOCK_K"] == (32 if form == "I4" else 16)


def test_prompts_attend_as_was_measured_on_the_card(
    fake_gpu: Callable[[dict[str, AnyTiles]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(attention_mixed, "mixed_attention_kernel", monkeypatch)
    problem = attention_tuning.prompt_problem(
        torch.float32, torch.float32, 9, 4, 2, 16, device=torch.device("cpu"), block_size=16
    )
    problem.launch(None)
    fake_gpu({problem.key: AttentionTiles(keys=16, num_warps=2, num_stages=1)})
    problem.launch(None)
    before, after = ((launch["KEYS"], launch["num_warps"]) for launch in spy.launches)
    assert before == (64, 4) and after == (16, 2)


def test_decoding_splits_as_was_measured_at_a_context_that_is_served(
    fake_gpu: Callable[[dict[str, AnyTiles]], None],
) -> None:
    """The splits of a longer context than there is would be empty; those of a shorter one are better than none."""
    device, kinds, sizes = torch.device("cpu"), (torch.float16, torch.float8_e4m3fn), (8, 2, 64)
    made = {
        context: attention_tuning.decode_problem(*kinds, 4, *sizes, context, num_sms=4, device=device).key
        for context in (1024, 4096)
    }
    tiles = AttentionTiles(keys=32, num_splits=9, num_warps=8)
    assert attention_tuning.measured_tiles(*kinds, 3, *sizes, 4096, device) is None
    tuning.stored.cache_clear()
    fake_gpu({made[1024]: replace(tiles, num_splits=5), made[4096]: tiles})
    found = {
        longest: attention_tuning.measured_tiles(*kinds, 3, *sizes, longest, device)
        for longest in (1000, 1100, 4095, 4096, 9000)
    }
    splits = {longest: each and each.num_splits for longest, each in found.items()}
    assert splits == {1000: None, 1100: 4, 4095: 5, 4096: 9, 9000: 9}
    assert attention_tuning.measured_tiles(*kinds, 5, *sizes, 4096, device) is None, "for another number of rows"
    assert attention_tuning.measured_tiles(kinds[0], kinds[0], 3, *sizes, 4096, device) is None, "for another cache"


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
