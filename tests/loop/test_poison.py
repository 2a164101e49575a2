"""Requests that kill every core: found, given up, and nobody else with them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from front_harness import CONFIG, Collector, NumberText, Recorder, eventually, generation, run

from pageflight.core.config import EngineConfig
from pageflight.core.errors import EngineLost, PoisonRequest
from pageflight.loop import local
from pageflight.loop.core_process import CoreSpec, FakeEngine
from pageflight.loop.deaths import FORGIVEN_AFTER, GUILTY_AT, Death, Suspicion
from pageflight.loop.front import Front, Generation
from pageflight.loop.local import start_core
from pageflight.loop.open_sequence import OpenSequence
from pageflight.loop.status import read_status
from pageflight.loop.supervisor import SupervisorConfig
from pageflight.runners.fake import fake_continuation
from pageflight.runners.faulty import Fault

VOCAB_SIZE = 50_000  # so large that the poison does not come up by chance
POISON, OTHER_POISON = VOCAB_SIZE - 1, VOCAB_SIZE - 2


@contextmanager
def core(
    *faults: Fault, config: EngineConfig = CONFIG, hang_limit_s: float = 60.0, step_s: float = 0.0
) -> Iterator[tuple[Front, Recorder]]:
    recorder = Recorder()
    spec = CoreSpec(config=config, fake=FakeEngine(vocab_size=VOCAB_SIZE, faults=faults, step_s=step_s))
    supervision = SupervisorConfig(hang_limit_s=hang_limit_s, backoff_s=0.01)
    with start_core(spec, NumberText(), recorder, supervision=supervision) as front:
        yield front, recorder


def undisturbed(wanted: Generation) -> tuple[int, ...]:
    return tuple(fake_continuation(wanted.prompt_ids, wanted.sampling, vocab_size=VOCAB_SIZE))


def submit_all(front: Front, wishes: Sequence[Generation]) -> list[Collector]:
    sinks = [Collector() for _ in wishes]
    for wanted, sink in zip(wishes, sinks, strict=True):
        front.submit(wanted, sink)
    return sinks


def verify(wishes: Sequence[Generation], sinks: Sequence[Collector], guilty: Sequence[int] = ()) -> None:
    """The guilty got their error and nothing wrong before it, all others what they would have got without them."""
    for index, (wanted, sink) in enumerate(zip(wishes, sinks, strict=True)):
        final, expected = sink.wait().finals[0], undisturbed(wanted)
        if index in guilty:
            assert isinstance(final.error, PoisonRequest), f"{index}: {final}"
            assert sink.ids() == expected[: len(sink.ids())]
        else:
            assert final.error is None, f"{index}: {final.error}"
            assert sink.ids() == expected
            assert sink.text() == "".join(f"{token}," for token in expected)


def deaths(recorder: Recorder) -> int:
    return sum(num_restarts for num_restarts, _ in recorder.restarts)


def many(count: int, max_tokens: int = 20) -> list[Generation]:
    return [generation((index, 2, 3), max_tokens=max_tokens) for index in range(count)]


@pytest.mark.parametrize(
    ("fault", "num_deaths"),
    [
        (Fault(token_id=POISON, kind="exit"), 3),
        (Fault(token_id=POISON, kind="raise", when="collect"), 3),
        (Fault(token_id=POISON, kind="abort"), 3),
        (Fault(token_id=POISON, kind="kill"), 6),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_one_poison_among_32_streams_is_found_and_given_up_alone(fault: Fault, num_deaths: int) -> None:
    """Everybody who was open during five deaths was given up, those who only waited as well."""
    wishes = many(32)
    wishes[11] = generation((11, POISON, 3), max_tokens=20)
    with core(fault) as (front, recorder):
        sinks = submit_all(front, wishes)
        verify(wishes, sinks, guilty=[11])
        assert deaths(recorder) == num_deaths and recorder.num_poisoned == 1
        verify(many(3), submit_all(front, many(3)))


@pytest.mark.parametrize("when", ["submit", "collect"])
def test_a_token_that_is_poison_once_it_is_sampled_is_found_as_well(when: str) -> None:
    """A core that dies before the news of its last step have gone out takes the poisonous token with it, so the next
    one starts from a harmless prompt: alone in one step the sequence looked innocent."""
    wishes = many(32)
    others = {token for wanted in wishes[:-1] for token in (*wanted.prompt_ids, *undisturbed(wanted))}
    poison = undisturbed(wishes[-1])[6]
    assert poison not in others
    with core(Fault(token_id=poison, kind="exit", when=when), step_s=0.002) as (front, recorder):
        verify(wishes, submit_all(front, wishes), guilty=[31])
        assert deaths(recorder) == 3


def test_two_poisons_are_both_found() -> None:
    wishes = many(16)
    wishes[3] = generation((POISON, 1), max_tokens=20)
    wishes[9] = generation((5, OTHER_POISON), max_tokens=20)
    faults = Fault(token_id=POISON, kind="exit"), Fault(token_id=OTHER_POISON, kind="raise")
    with core(*faults) as (front, recorder):
        verify(wishes, submit_all(front, wishes), guilty=[3, 9])
        assert deaths(recorder) in (4, 5), "together, or one of them first"
        assert recorder.num_poisoned == 2


def test_a_request_that_hangs_the_engine_is_found() -> None:
    """The loop's thread is inside the step, so the sign of life stops with it."""
    wishes = many(8)
    wishes[2] = generation((2, POISON), max_tokens=20)
    with core(Fault(token_id=POISON, kind="hang"), hang_limit_s=1.5) as (front, recorder):
        verify(wishes, submit_all(front, wishes), guilty=[2])
        assert deaths(recorder) == 3


def test_long_steps_are_no_hang() -> None:
    """A step of 10 s under a limit of 60 s, in small."""
    wishes = many(4, max_tokens=2)
    with core(step_s=1.2, hang_limit_s=4.0) as (front, recorder):
        verify(wishes, submit_all(front, wishes))
        assert deaths(recorder) == 0


NARROW = replace(CONFIG, scheduler=replace(CONFIG.scheduler, max_num_seqs=2))


def test_who_only_waits_is_never_suspected() -> None:
    """Two rows: the poison and one other run, ten wait and see core after core die."""
    wishes = many(12)
    wishes[0] = generation((POISON, 7), max_tokens=20)
    with core(Fault(token_id=POISON, kind="exit"), config=NARROW) as (front, recorder):
        sinks = submit_all(front, wishes)
        waiting = list(front._book.open.values())[2:]
        sinks[0].wait()
        assert [sequence.suspicion.points for sequence in waiting] == [0] * len(waiting)
        verify(wishes, sinks, guilty=[0])
        assert deaths(recorder) == 3


def test_a_poison_in_the_queue_harms_nobody_before_its_turn() -> None:
    """Cores that were killed while it waited counted against it, and its turn came without a fair trial."""
    wishes = [*many(2, max_tokens=300), generation((POISON, 7), max_tokens=5, priority=-1)]
    with core(Fault(token_id=POISON, kind="exit"), config=NARROW, step_s=0.004) as (front, recorder):
        sinks = submit_all(front, wishes)
        poison = list(front._book.open.values())[2]
        for kills in range(3):
            sinks[0].wait(lambda least=60 * kills + 20: sinks[0].num_ids >= least)
            kill_core(front)
            eventually(lambda least=kills: deaths(recorder) > least, "another core takes over")
            assert poison.suspicion.points == 0
        verify(wishes, sinks, guilty=[2])
        assert deaths(recorder) == 6


def test_the_sequences_of_another_front_are_told_apart() -> None:
    """Both fronts number their sequences from 0."""
    wishes = many(6)
    wishes[4] = generation((POISON, 7), max_tokens=20)
    with core(Fault(token_id=POISON, kind="exit")) as (front, _), ExitStack() as stack:
        second = Front(front._address, NumberText(), other := Recorder())
        stack.callback(second.close, 0)
        second.wait_ready(60)
        others = many(6, max_tokens=100)
        theirs, ours = submit_all(second, others), submit_all(front, wishes)
        verify(wishes, ours, guilty=[4])
        verify(others, theirs)
        assert other.num_poisoned == 0 and other.restarts


def test_killing_the_core_again_and_again_makes_nobody_guilty() -> None:
    """Kills that come faster than tokens: whoever was in the step each time was given up."""
    wishes = many(3, max_tokens=60)
    with core(step_s=0.02) as (front, recorder):
        sinks = submit_all(front, wishes)
        sinks[0].wait(lambda: sinks[0].num_ids > 5)
        for kills in range(4):
            kill_core(front)
            eventually(lambda least=kills: deaths(recorder) > least, "another core takes over")
        verify(wishes, sinks)


def test_points_are_forgotten_with_the_next_token() -> None:
    """Three unrelated deaths in an hour made a long answer poisonous."""
    wanted = generation(max_tokens=80)
    with core(step_s=0.004) as (front, recorder):
        sink = Collector()
        front.submit(wanted, sink)
        (sequence,) = front._book.open.values()
        for kills in range(GUILTY_AT + 1):
            reached = sink.num_ids + 5
            sink.wait(lambda least=reached: sink.num_ids >= least)
            assert isinstance(sequence, OpenSequence) and sequence.suspicion.points <= 1
            kill_core(front)
            eventually(lambda least=kills: deaths(recorder) > least, "another core takes over")
        verify([wanted], [sink])
        assert len(run(front, generation()).ids()) == 30


@contextmanager
def patched_core(patch: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Front, Recorder]]:
    """Cores whose fake runner was changed by `patch`."""
    code = "import os, sys\nfrom pageflight.loop.core_process import main\nfrom pageflight.runners import fake\n"
    command = local.core_command
    monkeypatch.setattr(
        local,
        "core_command",
        lambda *given: [sys.executable, "-c", f"{code}{patch}\nsys.exit(main())", *command(*given)[3:]],
    )
    with core(step_s=0.002) as (front, recorder):
        yield front, recorder


AT_BORDERS = """
collect = fake.FakeRunner.collect
def die_at_borders(self):
    for chunk in self._in_flight.chunks:
        if self._holders[chunk.row].num_prompt == 4 and chunk.length == 1 and chunk.start % 16 == 0:
            os.abort()
    return collect(self)
fake.FakeRunner.collect = die_at_borders
"""


def test_a_fault_at_every_16th_position_is_found_in_three_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens between made it innocent each time, and its trial was over before it struck again: 18 deaths."""
    wishes = [*many(3, max_tokens=200), generation((7, 7, 7, 7), max_tokens=300)]
    with patched_core(AT_BORDERS, monkeypatch) as (front, recorder):
        verify(wishes, submit_all(front, wishes), guilty=[3])
        assert deaths(recorder) == 3


def test_a_poisonous_prompt_is_given_up_for_all_its_answers_at_once() -> None:
    """Sixteen answers were tried one after another: 18 deaths."""
    wishes = many(3)
    with core(Fault(token_id=POISON, kind="exit")) as (front, recorder):
        sink = Collector(16)
        front.submit(generation((POISON, 1), n=16, temperature=1.0, max_tokens=20), sink)
        sinks = submit_all(front, wishes)
        assert all(isinstance(final.error, PoisonRequest) for final in sink.wait().finals.values())
        verify(wishes, sinks)
        assert deaths(recorder) == 3


BROKEN = "fake.FakeRunner.collect = lambda self: os.abort()"


def test_an_engine_that_completes_no_step_is_given_up_and_not_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken driver: each request was called poison, one after another, and the engine stayed ready for ever."""
    wishes = many(4)
    with patched_core(BROKEN, monkeypatch) as (front, recorder):
        for sink in submit_all(front, wishes):
            assert isinstance(sink.wait().finals[0].error, EngineLost)
        assert recorder.num_poisoned == 0 and not front.is_ready
        with pytest.raises(EngineLost):
            front.submit(wishes[0], Collector())


def test_poison_after_poison_does_not_look_like_a_broken_engine() -> None:
    """No core completes a step of anybody's; the probe tells the two apart."""
    with core(Fault(token_id=POISON, kind="exit")) as (front, recorder):
        for index in range(4):
            poison = generation((index, POISON), max_tokens=20)
            verify([poison], submit_all(front, [poison]), guilty=[0])
            assert deaths(recorder) == 3 * (index + 1)
        verify(many(2), submit_all(front, many(2)))


def blamed(*spacings: int) -> Suspicion:
    """By crashes of handle 5 after so many tokens each."""
    suspicion = Suspicion()
    for num_tokens in spacings:
        for _ in range(num_tokens):
            suspicion.produced(1)
        suspicion.blame(Death(epoch=1, handles=(5, 6), of_itself=True), 5)
    return suspicion


def test_a_trial_lasts_as_long_as_the_time_between_two_crashes() -> None:
    assert blamed(90).trial_tokens == 0
    assert blamed(90, 0).trial_tokens == 2
    assert blamed(90, 16).trial_tokens == 18
    assert [blamed(*[100] * count).trial_tokens for count in (2, 3, 4)] == [66, 102, 102], "all others stand still"


def test_crashes_are_forgotten_with_time() -> None:
    """Three unrelated crashes in an hour made a long answer poisonous."""
    assert blamed(0, FORGIVEN_AFTER - 1, FORGIVEN_AFTER - 1).is_guilty
    assert not blamed(0, FORGIVEN_AFTER, FORGIVEN_AFTER, FORGIVEN_AFTER, FORGIVEN_AFTER).is_guilty


def test_what_a_death_says() -> None:
    own = Death(epoch=1, handles=(5, 9), of_itself=True)
    assert [own.points(handle) for handle in (5, 9, 7)] == [2, 2, 0]
    killed = Death(epoch=1, handles=(5,), of_itself=False)
    assert [killed.points(handle) for handle in (5, 9)] == [1, 0]
    assert killed.proves_guilt(5) and not own.proves_guilt(5)
    between = Death(epoch=1, handles=(), of_itself=True)  # anybody's: points, never a proof
    assert between.points(5) == 1 and not between.proves_guilt(5)
    assert Death(epoch=1, handles=(), of_itself=False).points(5) == 0


def kill_core(front: Front) -> None:
    status = read_status(front._address.status)
    assert status is not None and status.core_pid
    os.kill(status.core_pid, signal.SIGKILL)
