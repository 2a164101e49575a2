"""Measures how products and attention are best cut into tiles on this card, and writes the file that the kernels read.

What the file has already is not measured again, so a run that ended before all was measured is continued by another.
Most important first: attention and products of decode steps.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from pageflight.kernels import attention_decode, attention_mixed, attention_tuning, gemm_fp8, gemm_int, moe, tuning
from pageflight.kernels.tuning import Problem
from pageflight.models.config import DecoderConfig
from perf.gpu_check.card import Card, Record, attempted

LIMIT_S = 360.0
"""No problem is begun later: its candidates may take a minute to compile."""
ROWS, CONTEXTS, TOKENS = (1, 4, 16, 64, 256), (2048, 16_384), (16, 32, 64, 128, 256, 1024, 4096)
MOST_CACHED = 1 << 21
GROUP = 128
EXPERTS, EXPERTS_CHOSEN = 8, 2


def tune(card: Card, config: DecoderConfig, out: Path | None, limit_s: float = LIMIT_S) -> Iterator[Record]:
    """One record for every problem that was measured, and a last one with how many are left.

    The file goes to the kernels' own folder and, beside the records, to `out`. Without a GPU it goes to `out` only, by
    a timer that measures nothing.
    """
    begin_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        name = torch.cuda.get_device_name(card.device) if card.is_gpu else "interpreted"
        folder = tuning.FOLDER if card.is_gpu else Path(scratch)
        path = tuning.file_of(name, folder)
        made = [maker for maker in problems(card, config) if maker[0] not in tuning.read(path)]
        num_measured = 0
        for key, make in made:
            if time.perf_counter() - begin_s > limit_s:
                break
            record = attempted(key, partial(_measured, key, make, name, folder, None if card.is_gpu else _no_timer()))
            yield record
            num_measured += "failed" not in record
            if out is not None and path.exists():
                out.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / path.name)
        yield {"name": "all", "measured": num_measured, "left": len(made) - num_measured, "file": path.name}


def _measured(
    key: str,
    make: Callable[[], Problem],
    name: str,
    folder: Path,
    timer: Callable[[Callable[[], object]], float] | None,
) -> Record:
    """The fastest of one problem's candidates, written to the file."""
    problem = make()
    if problem.key != key:
        return {"name": key, "failed": f"what is looked up under this key is measured as {problem.key}"}
    (choice,) = (found for _, found in tuning.tune([problem], gpu_name=name, folder=folder, timer=timer))
    return {"name": key, "us": round(choice.microseconds, 2), "tiles": choice.tiles}


def problems(card: Card, config: DecoderConfig) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """(key, what makes the problem): nothing is allocated before its turn."""
    parts = _decode, _products, _prompts, _mixtures
    yield from itertools.chain.from_iterable(part(card, config) for part in parts)


def _decode(card: Card, c: DecoderConfig) -> Iterator[tuple[str, Callable[[], Problem]]]:
    rows, contexts = (ROWS, CONTEXTS) if card.is_gpu else ((2,), (512,))
    sms = torch.cuda.get_device_properties(card.device).multi_processor_count if card.is_gpu else 8
    sizes = (c.num_heads, c.num_kv_heads, c.head_dim)
    for context, cache, count in itertools.product(contexts, _caches(card), rows):
        if count * context > MOST_CACHED:
            continue
        key = tuning.attention_key(attention_decode.KERNEL, _compute(card), cache, count, *sizes, context=context)

        def make(cache: torch.dtype = cache, count: int = count, context: int = context) -> Problem:
            kinds, device = (_compute(card), cache), card.device
            return attention_tuning.decode_problem(*kinds, count, *sizes, context, num_sms=sms, device=device)

        yield key, make


def _prompts(card: Card, c: DecoderConfig) -> Iterator[tuple[str, Callable[[], Problem]]]:
    sizes = (c.num_heads, c.num_kv_heads, c.head_dim)
    for cache, count in itertools.product(_caches(card), (256, 4096) if card.is_gpu else (16,)):
        key = tuning.attention_key(attention_mixed.KERNEL, _compute(card), cache, count, *sizes)

        def make(cache: torch.dtype = cache, count: int = count) -> Problem:
            return attention_tuning.prompt_problem(_compute(card), cache, count, *sizes, device=card.device)

        yield key, make


def _products(card: Card, c: DecoderConfig) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Of every layer, at each number of tokens: FP8 first, then int4 and int8."""
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    shapes = [(qkv, c.hidden_size), (c.hidden_size, c.num_heads * c.head_dim)]
    shapes += [(2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]
    tokens, group = (TOKENS, GROUP) if card.is_gpu else ((16,), 32)
    shapes = shapes if card.is_gpu else shapes[:1]
    device, compute = str(card.device), _compute(card)
    for kernel in (gemm_fp8.KERNEL, "gemm_int4", "gemm_int8"):
        if kernel == gemm_fp8.KERNEL and card.capability < 89:
            continue
        for count, (outputs, inputs) in itertools.product(tokens, shapes):
            size = group if kernel == "gemm_int4" else 0
            groups = () if kernel == gemm_fp8.KERNEL else (size or inputs,)
            key = tuning.key_of(kernel, compute, count, outputs, inputs, *groups)

            def make(
                kernel: str = kernel, count: int = count, outputs: int = outputs, inputs: int = inputs, size: int = size
            ) -> Problem:
                if kernel == gemm_fp8.KERNEL:
                    return gemm_fp8.problem(count, outputs, inputs, compute, device)
                return gemm_int.problem(kernel, count, outputs, inputs, size, compute, device)

            yield key, make


def _mixtures(card: Card, c: DecoderConfig) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for count in (16, 64, 2048) if card.is_gpu else (16,):
        sizes = (EXPERTS_CHOSEN, EXPERTS, 2 * c.intermediate_size, c.hidden_size)
        key = tuning.key_of(moe.LAYER, _compute(card), count, *sizes)

        def make(count: int = count) -> Problem:
            layer = (EXPERTS, EXPERTS_CHOSEN, c.hidden_size, c.intermediate_size)
            return moe.problem(count, *layer, _compute(card), str(card.device))

        yield key, make


def _compute(card: Card) -> torch.dtype:
    """The interpreter gets bf16 wrong."""
    return torch.bfloat16 if card.is_gpu else torch.float16


def _caches(card: Card) -> tuple[torch.dtype, ...]:
    return (_compute(card), *((torch.float8_e4m3fn,) if card.capability >= 89 else ()))


def _no_timer() -> Callable[[Callable[[], object]], float]:
    """Every candidate is slower than the one before."""
    times = itertools.count(1.0)
    return lambda call: next(times)
