"""A cache that is smaller than the demand costs little: no storms of preemptions."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # `perf` is not installed

from perf.cache_pressure import COSTS, Crowd, Side, Turn, take_turn, virtual

ROWS, SHARE, KEPT = 16, 0.6, 0.85
SIDES = [Side(), Side(share=SHARE), Side(share=SHARE, has_host=True)]


@cache
def turn(costs: str, crowd: str, is_open: bool) -> Turn:
    """In virtual time: sequences start, grow, are preempted and end, all under the eyes of the fake runner."""
    jobs = Crowd(name=crowd, num_requests=64, is_open=is_open).jobs(8192, seed=1)
    return take_turn(virtual(ROWS, COSTS[costs]), ROWS, jobs, SIDES)


@pytest.mark.parametrize(
    ("costs", "crowd"),
    [("bench-llama-60m", "varied"), ("bench-llama-60m", "growing"), ("bench-llama-0.5b", "varied")],
)
@pytest.mark.parametrize("is_open", [False, True], ids=["known", "open"])
def test_a_cache_of_60_percent_keeps_85_percent_of_the_throughput(costs: str, crowd: str, is_open: bool) -> None:
    """Sequences were preempted as soon as they had resumed, and much of the work was done twice."""
    outcomes = turn(costs, crowd, is_open)
    fits, small, with_host = (outcomes[side].run for side in SIDES)
    assert small.peak_blocks <= SHARE * fits.peak_blocks, "this cache was meant to be too small"
    assert small.full_tok_s >= KEPT * fits.full_tok_s
    assert with_host.full_tok_s >= small.full_tok_s
    assert small.counted("recomputed_tokens") <= 0.15 * small.counted("generated_tokens")


def test_nothing_is_computed_twice_where_the_host_has_room() -> None:
    run = turn("bench-llama-60m", "growing", False)[Side(share=SHARE, has_host=True)].run
    assert run.counted("preemptions") == run.counted("swaps_out") > 0
    assert run.counted("recomputed_tokens") == 0


def test_virtual_time_is_the_same_every_time() -> None:
    """A ratio that depended on the machine would be no test."""
    jobs = Crowd(name="growing", num_requests=12, is_open=True).jobs(8192, seed=2)
    first, second = (take_turn(virtual(8, COSTS["bench-llama-0.5b"]), 8, jobs, SIDES) for _ in range(2))
    assert [outcome.run.wall_s for outcome in first.values()] == [outcome.run.wall_s for outcome in second.values()]
    assert [outcome.run.ids for outcome in first.values()] == [outcome.run.ids for outcome in second.values()]


def test_the_answers_are_those_of_a_cache_that_fits() -> None:
    outcomes = turn("bench-llama-60m", "growing", False)
    for side, outcome in outcomes.items():
        assert outcome.run.ids == outcomes[Side()].run.ids, side.name
