"""What the next core is asked to carry on with, when one has died."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pageflight.core.request import Request, SamplingParams
from pageflight.loop.open_sequence import OpenSequence, request_of
from pageflight.sched.trials import TRIAL_TOKENS


def replays(groups: Iterable[list[OpenSequence]]) -> Iterator[tuple[Request, list[OpenSequence]]]:
    """Requests for the open sequences of generations, each with those that it is for. Sequences of which no core has
    known go as their client sent them, the others each alone. What ends already is left out."""
    for group in groups:
        wanted = [sequence for sequence in group if sequence.ending is None]
        is_whole = bool(wanted) and len(wanted) == wanted[0].generation.sampling.n
        if is_whole and not any(sequence.is_known for sequence in wanted):
            yield original_of(wanted[0]), group
            continue
        for sequence in wanted:
            sequence.alone = True
            yield replay_of(sequence), [sequence]


def original_of(leader: OpenSequence) -> Request:
    """A generation as its client sent it."""
    return request_of(leader.generation, handle=leader.leader, arrival_s=leader.arrival_s, deadline_s=leader.deadline_s)


def replay_of(sequence: OpenSequence) -> Request:
    """What a new core needs to carry on with one sequence, alone."""
    request = original_of(sequence)
    return replace(
        request,
        handle=sequence.handle,
        sampling=replace(request.sampling, n=1),
        sequence_index=sequence.index,
        output_ids=tuple(sequence.output_ids),
        is_taken_over=sequence.is_known,
        trial_tokens=sequence.suspicion.trial_tokens,
    )


def probe(handle: int) -> Request:
    """What every engine can compute that works at all: the first id, and the one after it, alone."""
    return Request(
        handle=handle,
        prompt_ids=(0,),
        sampling=SamplingParams(max_tokens=TRIAL_TOKENS),
        trial_tokens=TRIAL_TOKENS,
        is_taken_over=True,
    )
