"""Random commands through the whole loop: every request is answered once, and as if it had been alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.clock import ManualClock
from pageflight.loop.engine_loop import Cancel, Drain, EngineLoop, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner, fake_continuation
from pageflight.sched.scheduler import Scheduler

VOCAB_SIZE = 11
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 2), min_size=0, max_size=20),
        "max_tokens": st.integers(0, 16),
        "n": st.sampled_from([1, 1, 2]),
        "temperature": st.sampled_from([0.0, 0.7]),
        "patience_s": st.sampled_from([None, None, 3.0]),
        "stop": st.sampled_from([(), (4, 5)]),
    }
)
ACTIONS = st.lists(
    st.one_of(REQUESTS, st.sampled_from(["step", "step", "wait"]), st.integers(0, 20)), min_size=1, max_size=40
)


@settings(max_examples=80, deadline=None)
@given(ACTIONS, st.integers(4, 20), st.integers(1, 4), st.booleans())
def test_any_commands_end_every_sequence_once_with_its_own_tokens(
    actions: list[object], num_blocks: int, max_num_seqs: int, prefix_cache: bool
) -> None:
    """A cancel that met the last token of its sequence, or a deadline in the same turn, gave two endings or none."""
    config = SchedulerConfig(max_num_tokens=8, max_num_seqs=max_num_seqs, max_model_len=32, max_queue_size=4)
    kv = KVConfig(block_size=2, num_blocks=num_blocks, prefix_cache=prefix_cache)
    scheduler = Scheduler(config, kv, vocab_size=VOCAB_SIZE)
    limits = RunnerLimits(
        num_blocks=num_blocks, block_size=2, max_num_seqs=max_num_seqs, max_model_len=32, vocab_size=VOCAB_SIZE
    )
    mailbox, clock = InMemoryMailbox(), ManualClock()
    loop = EngineLoop(scheduler=scheduler, runner=FakeRunner(limits), mailbox=mailbox, clock=clock)
    requests: dict[int, Request] = {}
    next_handle = 0
    for action in actions:
        if isinstance(action, dict):
            sampling = SamplingParams(
                max_tokens=action["max_tokens"],
                n=action["n"],
                temperature=action["temperature"],
                stop_token_ids=action["stop"],
            )
            patience_s = action["patience_s"]
            deadline_s = None if patience_s is None else clock() + patience_s
            request = Request(
                handle=next_handle, prompt_ids=tuple(action["prompt"]), sampling=sampling, deadline_s=deadline_s
            )
            requests.update((next_handle + index, request) for index in range(sampling.n))
            next_handle += sampling.n
            mailbox.send(Submit(request))
        elif isinstance(action, int):
            mailbox.send(Cancel(action))
        elif action == "wait":
            clock.advance(1.0)
        elif scheduler.has_work or mailbox.has_commands:
            loop.step()
            scheduler.check()
    mailbox.send(Drain())
    loop.run()
    scheduler.check()
    assert scheduler.space.pool.num_free == num_blocks
    output_ids: dict[int, list[int]] = {handle: [] for handle in requests}
    reasons: dict[int, str] = {}
    for events in mailbox.take_events():
        for handle, token in zip(events.handles.tolist(), events.ids.tolist(), strict=True):
            assert handle not in reasons, "a token after the final event"
            output_ids[handle].append(token)
        for ending in events.finished:
            assert ending.handle not in reasons, "two final events"
            reasons[ending.handle] = ending.reason
    refused = [handle for handle, _error in mailbox.take_rejections()]
    assert len(set(refused)) == len(refused)
    for handle, request in requests.items():
        if request.handle in refused:
            assert handle not in reasons and not output_ids[handle]
            continue
        index = handle - request.handle
        expected = fake_continuation(request.prompt_ids, request.sampling, sequence_index=index, vocab_size=VOCAB_SIZE)
        got = output_ids[handle]
        if reasons[handle] in ("cancelled", "deadline"):
            assert got == expected[: len(got)]
        else:
            assert got == expected
