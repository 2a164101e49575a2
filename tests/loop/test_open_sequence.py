"""What a front shows of a sequence does not depend on how its tokens were grouped on the way."""

from __future__ import annotations

from itertools import chain

import pytest
from front_harness import NumberText, generation
from hypothesis import given, settings
from hypothesis import strategies as st

from pageflight.core.events import TokenEvent
from pageflight.core.plan import Finished
from pageflight.loop.front import Generation
from pageflight.loop.open_sequence import OpenSequence, SharedStops


def play(wanted: Generation, groups: list[list[int]]) -> list[TokenEvent]:
    """Feed groups of ids as frames would bring them, until the front or the ids end it."""
    events: list[TokenEvent] = []
    sequence = OpenSequence(wanted, events.append, SharedStops.of(wanted), NumberText(), leader=0, index=0)
    for group in groups:
        if sequence.ending is not None:
            break
        sequence.fresh = list(group)
        sequence.fresh_log_probs = [index / 2 for index in group]
        sequence.hold(sequence.take())
        if wanted.stream:
            events.append(sequence.event())
    count = len(sequence.output_ids)
    finished = Finished(handle=0, reason="length", num_prompt_tokens=1, num_output_tokens=count)
    events.append(sequence.final_event("", sequence.ending or "length", finished, None))
    return events


groups = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    groups=groups,
    stop=st.lists(st.text("0123,", min_size=1, max_size=4), max_size=3),
    stop_ids=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=2),
    min_tokens=st.integers(0, 4),
)
def test_grouping_changes_nothing(
    groups: list[list[int]], stop: list[str], stop_ids: list[list[int]], min_tokens: int
) -> None:
    """Frames are joined when the front is behind: a stop inside a joined group must end it at the same place."""
    wishes = {"stop": tuple(stop), "stop_ids": tuple(map(tuple, stop_ids)), "min_tokens": min_tokens}
    wanted = generation((1,), max_tokens=100, log_probs=True, **wishes)
    single = [[index] for group in groups for index in group]
    results = []
    for stream in (True, False):
        for parts in (groups, single, [list(chain(*groups))] if groups else []):
            events = play(generation((1,), max_tokens=100, stream=stream, log_probs=True, **wishes), parts)
            ids = [index for event in events for index in event.ids]
            log_probs = [value for event in events for value in event.log_probs]
            assert log_probs == [index / 2 for index in ids]
            assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
            results.append(("".join(event.text for event in events), ids, events[-1].finish_reason))
    assert all(result == results[0] for result in results)
    text, ids, reason = results[0]
    if reason == "length":
        assert ids == [index for group in single for index in group]
    assert "".join(f"{index}," for index in ids).startswith(text)
    assert wanted.sampling.min_tokens <= len(ids) or reason == "length"


@pytest.mark.parametrize(("ids", "reason"), [([5, 9], "stop"), ([5, 6, 7], "length"), ([5], None), ([], None)])
def test_a_sequence_whose_core_died_after_its_last_token_is_over(ids: list[int], reason: str | None) -> None:
    """Replayed, it would ask the next core for a token too many."""
    wanted = generation((1,), max_tokens=3, stop_token_ids=(9,))
    sequence = OpenSequence(wanted, lambda _: None, SharedStops.of(wanted), NumberText(), leader=0, index=0)
    sequence.output_ids = ids
    assert sequence.ended_by_itself() == reason
