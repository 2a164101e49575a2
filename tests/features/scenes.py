"""A request with two features, what happens around it, and whether its answer is the one it must be."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reference import Expected, Reference
from stack import WAIT_S, CoreDied, Got, Sender, Stack

from features import Feature, Seen
from pageflight.core import wire

OUTPUTS = frozenset(
    ("text_output", "output_ids", "sequence_length", "finish_reason", "num_input_tokens", "num_output_tokens")
)
BASE = {"request_output_len": 16}
COMPANIONS = ({"request_output_len": 9}, {"request_output_len": 14, "temperature": 1.0, "seed": 3})
CROWD = {"request_output_len": 40, "ignore_eos": True}
ENDS = ("stop_words", "stop_token_ids", "stop_words_list", "end_id")
ACT_AT = 4  # steps after the request was sent
DEADLINE_MS = 40
CANCELLED = ("CANCELLED",)


@dataclass(frozen=True)
class Prompts:
    """`main` and `crowd` are long enough for blocks to be shared; they begin differently."""

    main: tuple[int, ...]
    companions: tuple[tuple[int, ...], ...]
    crowd: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """`counted`: what the cores' counters gained."""

    options: Mapping[str, Any]
    expected: Expected
    got: Got
    counted: Mapping[str, int]
    num_cores: int


def options_of(pair: Sequence[Feature], prompt: tuple[int, ...], reference: Reference) -> dict[str, Any]:
    """What the client sends for both features. Those that depend on the answer come last, one after the other."""
    options: dict[str, Any] = dict(BASE)
    for feature in pair:
        options |= feature.options
    for feature in pair:
        if feature.when_seen is not None:
            endless = {name: value for name, value in options.items() if name not in ENDS}
            whole = reference.answer(prompt, {**endless, "ignore_eos": True})
            lengths = [len(reference.text(whole.ids[: count + 1], options)) for count in range(len(whole.ids))]
            options |= feature.when_seen(Seen(whole.ids, whole.text, tuple(lengths)))
    return options


def play(pair: Sequence[Feature], stack: Stack, prompts: Prompts, reference: Reference) -> Outcome:
    """Run the request with its company; assert that everybody's answer is right."""
    scenes = frozenset().union(*(feature.scenes for feature in pair))
    options = options_of(pair, prompts.main, reference)
    sent = {**options, "timeout_ms": DEADLINE_MS} if "deadline" in scenes else options
    before, num_cores = _counters(stack), len(stack.cores)
    shared = {name: options[name] for name in ("tenant", "cache_salt") if name in options}
    if "warm" in scenes:
        _finished(stack.ask(prompts.main, {"request_output_len": 2, **shared}, OUTPUTS))
    company = []
    if "crowd" in scenes:
        company = [(prompt, CROWD, stack.ask(prompt, CROWD, OUTPUTS)) for prompt in prompts.crowd]
    if "twin" in scenes:
        twin = {**BASE, **shared}
        company.append((prompts.main, twin, stack.ask(prompts.main, twin, OUTPUTS)))
    company += [(p, o, stack.ask(p, o, OUTPUTS)) for p, o in zip(prompts.companions, COMPANIONS, strict=True)]
    sender = _ask_in_scene(stack, prompts.main, sent, scenes)
    got = _finished(sender)
    for prompt, asked, other in company:
        _check_whole(_finished(other), prompt, asked, reference)
    expected = reference.answer(prompts.main, options)
    if got.errors:
        assert scenes & {"cancel", "deadline"}, got.errors
        _check_cut(got, prompts.main, options, reference)
    else:
        _check_whole(got, prompts.main, options, reference)
    counted = {name: value - before.get(name, 0) for name, value in _counters(stack).items()}
    return Outcome(options, expected, got, counted, len(stack.cores) - num_cores)


def _ask_in_scene(stack: Stack, prompt: tuple[int, ...], options: dict[str, Any], scenes: frozenset[str]) -> Sender:
    """Send the request; what has to happen does so at the same step of the core each time."""
    core, asked_s, sender = stack.core, 0.0, None
    act_at, is_asked = core.runner.num_steps + ACT_AT, threading.Event()

    def before_step(number: int) -> None:
        if number < act_at:
            return
        is_asked.wait(WAIT_S)  # on a busy machine the answer was over before this thread had noted who asks
        assert sender is not None
        if "cancel" in scenes:
            sender.wants_to_cancel = not sender.is_over.is_set()
            sender.was_asked.wait(1.0)
            time.sleep(0.003)  # the cancellation is on its way
        if "deadline" in scenes:
            time.sleep(max(0.0, asked_s + DEADLINE_MS / 1000 + 0.002 - time.monotonic()))
        if "death" in scenes and number > act_at:
            raise CoreDied

    core.runner.before_step = before_step if scenes & {"cancel", "deadline", "death"} else lambda number: None
    asking = stack.ask(prompt, options, _outputs(options))
    asked_s, sender = time.monotonic(), asking  # not before the front has it: its clock starts then
    is_asked.set()
    if "death" in scenes:
        stack.begin_another_core()
    return asking


def _outputs(options: Mapping[str, Any]) -> frozenset[str]:
    wanted = {name for option, names in wire.RETURN_OPTIONS.items() if options.get(option) for name in names}
    return OUTPUTS | wanted


def _finished(sender: Sender) -> Got:
    assert sender.is_over.wait(WAIT_S), "no final response"
    return Got.of(sender)


def _counters(stack: Stack) -> dict[str, int]:
    total: dict[str, int] = {}
    for stats in stack.stats():
        for name in ("preemptions", "swaps_in", "cached_tokens", "recomputed_tokens", "steps"):
            total[name] = total.get(name, 0) + getattr(stats, name)
    return {**total, "partial_chunks": sum(core.runner.num_partial_chunks for core in stack.cores)}


def _check_cut(got: Got, prompt: tuple[int, ...], options: Mapping[str, Any], reference: Reference) -> None:
    """The client hears why there is no more; what a stream has brought until then is the answer's beginning."""
    assert {code for code, _message in got.errors} == {"CANCELLED"}, got.errors
    assert options.get("streaming") or not got.ids
    for index, ids in got.ids.items():
        if index not in got.finals:
            reference.check_ids(prompt, ids, options, index)


def _check_whole(got: Got, prompt: tuple[int, ...], options: Mapping[str, Any], reference: Reference) -> None:
    assert not got.errors, got.errors
    count = options.get("num_return_sequences", 1)
    assert sorted(got.ids) == sorted(got.finals) == list(range(count))
    has_echo = not options.get("exclude_input_in_output", True) and not options.get("streaming")
    for index in range(count):
        ids, text = got.ids[index], got.text[index]
        if has_echo:
            assert tuple(ids[: len(prompt)]) == prompt
            ids = ids[len(prompt) :]
        reference.check_ids(prompt, ids, options, index)
        if reference.is_exact:
            assert tuple(ids) == reference.answer(prompt, options, index).ids
        for length in range(1, len(ids)):
            assert not reference.ending(ids[:length], options)[1], f"the answer goes on after its end: {ids}"
        ending, reason = reference.ending(ids, options)
        assert text == (reference.text(prompt, {}) if has_echo else "") + ending
        final = got.finals[index]
        assert final["finish_reason"] == reason
        assert final["num_output_tokens"] == len(ids) and final["num_input_tokens"] == len(prompt)
        if options.get("return_log_probs"):
            expected = reference.log_probs(prompt, ids)
            tolerance = 1e-4 if reference.is_exact else 0.2
            assert all(abs(a - b) < tolerance for a, b in zip(got.log_probs[index], expected, strict=True))
            assert abs(final["cum_log_probs"] - sum(expected)) < tolerance * len(ids)
        if options.get("return_perf_metrics"):
            times = [final[f"{name}_time_ns"] for name in ("arrival", "first_scheduled", "first_token", "last_token")]
            assert times == sorted(times) and times[0] > 0
            reused, new = final["kv_cache_reused_blocks"], final["kv_cache_alloc_new_blocks"]
            assert final["kv_cache_alloc_total_blocks"] == reused + new > 0
