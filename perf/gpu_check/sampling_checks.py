"""Ids that the kernels choose against those of the host's sampler, for rows with wishes of every kind.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams
from pageflight.kernels.sampling import RowParameters, Workspace, sample
from pageflight.runners.device_wishes import RowWishes
from pageflight.sampling.sampler import Sampler
from perf.gpu_check.bench import Bench
from perf.gpu_check.card import Record, failure

STEPS = 2
"""One after another: penalties count what was chosen before."""
NUM_PROMPT, LAST = 4, 3
"""Tokens of a prompt, and the last of them, with which a word begins that is not to be said."""
MOST_DIFFERING = 0.01
"""Of ids that are drawn: exponentials are rounded otherwise than on the host, which may move a border past a number."""


def wishes_of(row: int, vocab_size: int, chance: np.random.Generator) -> SamplingParams:
    """Greedy or drawn, of all or a part, and every second row with something that changes its scores."""
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 200, "top_p": 0.8, "min_p": 0.01},
    )
    ids = chance.choice(vocab_size, 40, replace=False).tolist()
    biases = tuple((token, float(value)) for token, value in zip(ids[10:], chance.normal(0, 8, 30), strict=True))
    likely = ((ids[0], 20.0), (ids[1], 18.0))
    changes: tuple[dict[str, Any], ...] = (
        {"logit_bias": biases},
        {"logit_bias": likely, "repetition_penalty": 1.8, "presence_penalty": 1.5, "frequency_penalty": 1.0},
        {
            "logit_bias": likely,
            "bad_words_ids": ((ids[0],), (LAST, ids[1]), (ids[2], ids[3])),
            "frequency_penalty": 0.5,
        },
        {"logit_bias": likely, "min_tokens": 8, "stop_token_ids": (ids[0], ids[5])},
    )
    change = changes[(row // 2 + row // 10) % len(changes)] if row % 2 else {}
    return replace(SamplingParams(seed=row * 1_000_003, log_probs=True), **kinds[row // 2 % len(kinds)], **change)


def sampled(bench: Bench) -> Record:
    """Whether the ids are the host's, and the log probabilities with them."""
    rows, vocab, length = (8 if bench.is_tiny else 240), bench.vocab, 16
    chance = np.random.default_rng(3)
    host, wishes = Sampler(max_num_seqs=rows, vocab_size=vocab), RowWishes(rows, vocab, bench.device)
    tokens_RM = chance.integers(0, vocab, (rows, length)).astype(np.int32)
    tokens_RM[:, NUM_PROMPT - 1] = LAST
    params = [wishes_of(row, vocab, chance) for row in range(rows)]
    starts = [
        RowStart(row, row, row % 3, tokens_RM[row, :NUM_PROMPT].copy(), NUM_PROMPT, wish)
        for row, wish in enumerate(params)
    ]
    lines = wishes.prepared(_starting(starts))
    parameters = RowParameters.empty(rows, bench.device)
    for start, line in zip(starts, lines, strict=True):
        host.start(start)
        parameters.floats[start.row] = torch.from_numpy(line.floats.view(np.float64)).to(bench.device)
        parameters.integers[start.row] = torch.from_numpy(line.integers.view(np.int64)).to(bench.device)
    num_tokens_R, workspace = np.full(rows, NUM_PROMPT, np.int32), Workspace(rows, vocab, bench.device)
    rows_L = np.arange(rows, dtype=np.int32)
    on_device = torch.from_numpy(rows_L).to(bench.device)
    is_drawn = np.array([wish.temperature > 0 for wish in params])
    agree, worst = np.ones(rows, np.bool_), 0.0

    num_bad = 0
    for _ in range(STEPS):
        logits = (torch.randn(rows, vocab, device=bench.device) * 3).to(bench.compute)
        ids_L, expected_L = host.sample(logits.float().cpu().numpy(), rows_L, tokens_RM, num_tokens_R)
        state, counts = (torch.tensor(part, device=bench.device) for part in (tokens_RM.ravel(), num_tokens_R))
        out = sample(logits, on_device, state, counts, parameters, workspace, stride_tokens=length)
        found_L, log_probs_L, are_bad_L = (part.cpu().numpy() for part in (out.ids_L, out.log_probs_L, out.are_bad_L))
        num_bad += int(are_bad_L.sum())
        agree &= found_L == ids_L  # what follows one that differs has other counts
        assert expected_L is not None
        worst = max(worst, float(np.abs(log_probs_L - expected_L)[agree].max(initial=0.0)))
        tokens_RM[rows_L, num_tokens_R] = ids_L
        num_tokens_R += 1
    differing = ~agree
    complaint = (
        f"{int(differing[~is_drawn].sum())} greedy and {int(differing[is_drawn].sum())} drawn rows differ, "
        f"{num_bad} are bad, log probabilities are {worst:.1e} away"
    )
    most = max(1, int(MOST_DIFFERING * STEPS * is_drawn.sum())) if bench.card.is_gpu else 0
    is_right = not differing[~is_drawn].any() and differing.sum() <= most and not num_bad and worst < 1e-3
    times = bench.timed(lambda: sample(logits, on_device, state, counts, parameters, workspace, stride_tokens=length))
    return {
        "name": "sample",
        "rows": rows,
        "vocab": vocab,
        "differing": int(differing.sum()),
        "error": worst,
        **failure(complaint, unless=bool(is_right)),
        **times,
    }


def _starting(starts: list[RowStart]) -> StepPlan:
    nothing = np.zeros(0, np.int32)
    samples = np.zeros(0, np.bool_)
    return StepPlan(step=0, rows=nothing, starts_at=nothing, lengths=nothing, samples=samples, starts=tuple(starts))
