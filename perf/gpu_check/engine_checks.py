"""The runner on the card: graphs against eager steps, one step against its floor, and offline throughput."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.plan import RowStart, StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.models.config import DecoderConfig
from pageflight.runners.base import RunnerLimits
from pageflight.runners.device import DeviceRunner
from pageflight.sched.scheduler import Scheduler
from perf.gpu_check.card import Card, Record, attempted, failure
from perf.gpu_check.models import BLOCK_SIZE, random_model, weight_bytes

MEMORY_SHARE = 0.85
CONTEXT = 256  # of the rows whose step is timed
WARM_REQUESTS, WARM_TOKENS = 16, 4
"""Of a run before the measured one."""
IDLE_AFTER, IDLE_STEPS = 40, 64
"""Steps before the trace of what the card does, when prompts and answers are mixed, and in it."""


GRAPH_REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    {"logit_bias": ((5, 2.5), (7, -100.0)), "min_tokens": 3, "stop_token_ids": (9, 11)},
    {"temperature": 1.0, "bad_words_ids": ((13,), (17, 19)), "frequency_penalty": 0.5},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "min_p": 0.01},
    {},
)
"""What answers wish that end one after another: steps are captured with and without what such wishes take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of one length, all there at the beginning."""

    num_prompt: int
    num_output: int
    num_requests: int

    def facts(self) -> Record:
        return {"input": self.num_prompt, "output": self.num_output, "requests": self.num_requests}


def compute_of(card: Card) -> torch.dtype:
    return torch.bfloat16 if card.is_gpu else torch.float32


def make_runner(
    card: Card,
    config: DecoderConfig,
    dtype: str,
    *,
    max_num_seqs: int,
    max_num_tokens: int,
    max_model_len: int,
    kv_dtype: str | None = None,
    uses_graphs: bool = True,
) -> DeviceRunner:
    """A runner with blocks for all its rows, as far as the card's memory goes."""
    gc.collect()  # a runner before this one refers to itself
    compute = compute_of(card)
    model = random_model(config, dtype, card.device, max_model_len=max_model_len, compute=compute, kv_dtype=kv_dtype)
    num_blocks = max_num_seqs * -(-max_model_len // BLOCK_SIZE)
    if card.is_gpu:
        torch.cuda.empty_cache()
        left, total = torch.cuda.mem_get_info(card.device)
        spare = left - int((1 - MEMORY_SHARE) * total)
        num_blocks = min(num_blocks, spare // model.blocks.bytes_per_block)
    runner = DeviceRunner(
        model,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_tokens=max_num_tokens,
        max_model_len=max_model_len,
        uses_graphs=uses_graphs,
    )
    if card.is_gpu:
        runner.warm_up(max_num_tokens - max_num_seqs)
    return runner


def graphs(card: Card, config: DecoderConfig) -> Iterator[Record]:
    """Captured steps give the ids of eager ones, with ever fewer rows: K/V as activations, and FP8."""
    for kv_dtype in (None, *(("fp8",) if card.capability >= 89 else ())):
        name = f"graphs kv {kv_dtype or compute_of(card)}"
        yield attempted(name, partial(_captured, name, card, config, kv_dtype))


def _captured(name: str, card: Card, config: DecoderConfig, kv_dtype: str | None) -> Record:
    lengths = {"max_num_seqs": 8, "max_num_tokens": 128, "max_model_len": 96}
    requests = GRAPH_REQUESTS if card.is_gpu else GRAPH_REQUESTS[:2]
    answers = []
    for uses_graphs in (False, True):
        runner = make_runner(card, config, "bf16", uses_graphs=uses_graphs, kv_dtype=kv_dtype, **lengths)
        scheduler = make_scheduler(runner, max_num_tokens=64)
        for handle, wishes in enumerate(requests):
            growth = 4 if card.is_gpu else 1
            sampling = SamplingParams(max_tokens=2 + growth * handle, seed=handle, **wishes)
            prompt = tuple(range(2 + handle, 4 + 4 * growth + 3 * handle))
            scheduler.submit(Request(handle=handle, prompt_ids=prompt, sampling=sampling), 0.0)
        answers.append(drive(scheduler, runner).ids)
        runner.close()
    return {
        "name": name,
        "sequences": len(answers[0]),
        "tokens": sum(map(len, answers[0].values())),
        **failure("captured steps give other ids than eager ones", unless=answers[0] == answers[1]),
    }


def steps(card: Card, config: DecoderConfig, dtype: str, batches: tuple[int, ...]) -> Iterator[Record]:
    """Decode steps one after another, two in flight, against the floor: weights and K/V read once."""
    bandwidth = card.bandwidth()
    context = CONTEXT if card.is_gpu else 16
    num_steps = 64 if card.is_gpu else 2
    longest = context + 4 * num_steps
    runner = make_runner(
        card, config, dtype, max_num_seqs=max(batches), max_num_tokens=2 * max(batches), max_model_len=longest
    )
    element = compute_of(card).itemsize
    kv_bytes = 2 * config.num_layers * config.kv_size * element
    step = 0
    for batch in batches:
        starts, table, columns = [], [], -(-longest // BLOCK_SIZE)
        for row in range(batch):
            ids = np.arange(context, dtype=np.int32) % config.vocab_size
            starts.append(RowStart(row, row, 0, ids, context, SamplingParams(max_tokens=longest)))
            table += [(row, column, (row * columns + column) % runner.limits.num_blocks) for column in range(columns)]
        rows, updates = np.arange(batch, dtype=np.int32), np.array(table, np.int32).T
        in_flight, times, host_s = 0, [], 0.0
        for number in range(num_steps + 4):
            begin_s = time.perf_counter()
            plan = StepPlan(
                step=step,
                rows=rows,
                starts_at=np.full(batch, context - 1 + number, np.int32),
                lengths=np.ones(batch, np.int32),
                samples=np.ones(batch, np.bool_),
                starts=tuple(starts) if number == 0 else (),
                table_rows=updates[0] if number == 0 else None,
                table_columns=updates[1] if number == 0 else None,
                table_blocks=updates[2] if number == 0 else None,
            )
            runner.submit(plan)
            host_s += time.perf_counter() - begin_s if number >= 4 else 0.0
            step, in_flight = step + 1, in_flight + 1
            if in_flight == 2:
                runner.collect()
                in_flight -= 1
                times.append(time.perf_counter())
        runner.collect()
        runner.submit(_ending(step, rows))
        runner.collect()
        step += 1
        seconds = float(np.median(np.diff(times[4:]))) if len(times) > 5 else times[-1] - times[0]
        floor_s = (weight_bytes(config, dtype, element) + batch * context * kv_bytes) / bandwidth
        yield {
            "name": f"step {dtype}",
            "batch": batch,
            "context": context,
            "ms": round(seconds * 1e3, 3),
            "floor_ms": round(floor_s * 1e3, 3),
            "of_floor": round(floor_s / seconds, 3),
            "host_submit_us": round(host_s / num_steps * 1e6, 1),
        }
    runner.close()


def throughput(
    card: Card, config: DecoderConfig, dtype: str, loads: tuple[Load, ...], *, max_num_seqs: int, max_num_tokens: int
) -> Iterator[Record]:
    """Offline: all requests at once, every answer as long as asked for, which is checked."""
    for load in loads:

        def check(load: Load = load) -> Record:
            return _offline(card, config, dtype, load, max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens)

        yield {"name": f"throughput {dtype}", **load.facts(), **attempted(f"throughput {dtype}", check)}


def _offline(
    card: Card, config: DecoderConfig, dtype: str, load: Load, *, max_num_seqs: int, max_num_tokens: int
) -> Record:
    runner = make_runner(
        card,
        config,
        dtype,
        max_num_seqs=max_num_seqs,
        max_num_tokens=max_num_tokens + max_num_seqs,
        max_model_len=load.num_prompt + load.num_output + 1,
    )
    chance = np.random.default_rng(5)
    if card.is_gpu:  # what is captured or compiled later would be measured
        runner.capture_all()
        drive(_requested(runner, load, chance, max_num_tokens, count=WARM_REQUESTS, num_output=WARM_TOKENS), runner)
    count = load.num_requests
    run = drive(_requested(runner, load, chance, max_num_tokens, count=count, num_output=load.num_output), runner)
    idle = _idle_share(card, runner, load, chance, max_num_tokens)
    runner.close()
    lengths = sorted({len(ids) for ids in run.ids.values()})
    complaint = f"{len(run.ids)} of {count} answers, of {lengths} tokens"
    return {
        "name": f"throughput {dtype}",
        "out_tok_s": round(count * load.num_output / run.seconds, 1),
        "seconds": round(run.seconds, 2),
        "steps": run.num_steps,
        "host_us_per_step": round(run.host_s / run.num_steps * 1e6, 1),
        "waited_share": round(run.waited_s / run.seconds, 3),
        "gpu_idle_share": idle,
        "kv_blocks": runner.limits.num_blocks,
        **failure(complaint, unless=lengths == [load.num_output] and len(run.ids) == count),
    }


def _requested(
    runner: DeviceRunner, load: Load, chance: np.random.Generator, max_num_tokens: int, *, count: int, num_output: int
) -> Scheduler:
    """So many of the load's requests, with prompts at random."""
    scheduler = make_scheduler(runner, max_num_tokens=max_num_tokens)
    for handle in range(count):
        prompt = tuple(chance.integers(2, runner.limits.vocab_size, load.num_prompt).tolist())
        sampling = SamplingParams(max_tokens=num_output)
        scheduler.submit(Request(handle=handle, prompt_ids=prompt, sampling=sampling), 0.0)
    return scheduler


def _idle_share(
    card: Card, runner: DeviceRunner, load: Load, chance: np.random.Generator, max_num_tokens: int
) -> float | None:
    """Of steps in the middle of such a load, as the driver's trace of kernels and copies has them; None on a CPU.

    Tracing makes the host slower, so it is no less than without.
    """
    if not card.is_gpu:
        return None
    count = runner.limits.max_num_seqs
    scheduler = _requested(runner, load, chance, max_num_tokens, count=count, num_output=load.num_output)
    drive(scheduler, runner, num_steps=IDLE_AFTER)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        drive(scheduler, runner, num_steps=IDLE_STEPS)
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if str(event.device_type).endswith("CUDA")
    ]
    return round(idle_share(spans), 3)


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Of the time from the first begin to the last end: in how much of it nothing ran. Spans may overlap."""
    busy, reached = 0.0, min(begin for begin, _ in spans)
    whole = max(end for _, end in spans) - reached
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 1.0 - busy / whole


@dataclass(slots=True)
class Driven:
    """`waited_s`: the host had nothing to do but wait for the card. When it is near 0, the card waits for the host."""

    ids: dict[int, list[int]]
    log_probs: dict[int, list[float]] = field(default_factory=dict)
    num_steps: int = 0
    seconds: float = 0.0
    host_s: float = 0.0
    waited_s: float = 0.0


class PlanRunner(Protocol):
    """What plans are driven through."""

    limits: RunnerLimits

    def submit(self, plan: StepPlan) -> None: ...
    def collect(self) -> StepResult: ...


def make_scheduler(runner: PlanRunner, *, max_num_tokens: int) -> Scheduler:
    limits = runner.limits
    config = SchedulerConfig(
        max_num_tokens=max_num_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        max_queue_size=1 << 20,
    )
    kv = KVConfig(num_blocks=limits.num_blocks, block_size=limits.block_size, prefix_cache=False)
    return Scheduler(config, kv, vocab_size=limits.vocab_size)


def drive(scheduler: Scheduler, runner: PlanRunner, *, num_steps: int | None = None) -> Driven:
    """Until everything has ended, or for so many steps, with a second one in flight whenever there is one to plan."""
    run = Driven({})
    in_flight: deque[StepPlan] = deque()
    begin_s = time.perf_counter()
    while scheduler.has_work or in_flight:
        while len(in_flight) < runner.limits.max_in_flight and run.num_steps + len(in_flight) != num_steps:
            plan = scheduler.plan(time.perf_counter())
            if plan is None:
                break
            runner.submit(plan)
            in_flight.append(plan)
        if not in_flight:
            break
        waiting_s = time.perf_counter()
        result = runner.collect()
        run.waited_s += time.perf_counter() - waiting_s
        events = scheduler.settle(in_flight.popleft(), result, time.perf_counter())
        run.num_steps += 1
        for handle, token in zip(events.handles.tolist(), events.ids.tolist(), strict=True):
            run.ids.setdefault(handle, []).append(token)
        if events.log_probs is not None:
            for handle, log_prob in zip(events.handles.tolist(), events.log_probs.tolist(), strict=True):
                run.log_probs.setdefault(handle, []).append(log_prob)
    run.seconds = time.perf_counter() - begin_s
    run.host_s = run.seconds - run.waited_s
    return run


def _ending(step: int, rows: np.ndarray) -> StepPlan:
    nothing = np.zeros(0, np.int32)
    return StepPlan(
        step=step,
        rows=nothing,
        starts_at=nothing,
        lengths=nothing,
        samples=np.zeros(0, np.bool_),
        ended_rows=tuple(rows.tolist()),
    )
