# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Whole blocks copied inside the cache, gathered into a staging buffer and scattered from it, all layers at once.

Shapes: L layers, N blocks of the cache, n blocks of a call, W 32-bit words of a block in one layer and kind (K or V).
The cache is [L, 2, N, kv heads, block size, head_dim] of any element type, its blocks contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.attention_tile import INDICES, check_integers, signature
from pageflight.kernels.builds import KernelBuild

WORDS_PER_PROGRAM = 2048
NUM_WARPS = 4


@triton.jit(do_not_specialize_on_alignment=INDICES)
def copy_blocks_kernel(
    sources,
    targets,
    source_ids,
    target_ids,
    stride_source_part,
    stride_source_block,
    stride_target_part,
    stride_target_block,
    NUM_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Copies one piece of one block of one part (layer and kind). Ids that are None count from 0; -1 is padding."""
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    source, target = index, index
    if source_ids is not None:
        source = tl.load(source_ids + index).to(tl.int64)
    if target_ids is not None:
        target = tl.load(target_ids + index).to(tl.int64)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    wanted = (word < NUM_WORDS) & (source >= 0) & (target >= 0)
    words = tl.load(sources + part * stride_source_part + source * stride_source_block + word, mask=wanted)
    tl.store(targets + part * stride_target_part + target * stride_target_block + word, words, mask=wanted)


def copy_blocks(cache: Tensor, sources_n: Tensor, targets_n: Tensor) -> None:
    """Copy whole blocks in every layer, K and V. Pairs with -1 are padding.

    No block may be both a source and a target, nor twice a target, within one call: copies run side by side.
    """
    assert len(sources_n) == len(targets_n)
    words = _words(cache)
    _launch(words, words, sources_n, targets_n)


def staging_shape(cache: Tensor, num_blocks: int) -> tuple[int, ...]:
    """Shape of a buffer for `num_blocks` blocks: [num_blocks, L, 2, kv heads, block size, head_dim]."""
    layers, kinds, _, *block = cache.shape
    return (num_blocks, layers, kinds, *block)


def gather_blocks(staging: Tensor, cache: Tensor, blocks_n: Tensor) -> None:
    """Copy blocks `blocks_n` of the cache to the first n places of `staging`, whole blocks one after another.

    `staging`: contiguous, of the cache's type, at least n blocks as `staging_shape` says. Where it is, device memory
    or host memory that the device can address, is the caller's choice. -1 leaves a place as it is.
    """
    _launch(_words(cache), _staged_words(staging, cache, len(blocks_n)), blocks_n, None)


def scatter_blocks(cache: Tensor, staging: Tensor, blocks_n: Tensor) -> None:
    """Copy the first n places of `staging` to blocks `blocks_n` of the cache. -1 skips a place; no block twice."""
    _launch(_staged_words(staging, cache, len(blocks_n)), _words(cache), None, blocks_n)


def _launch(sources: Tensor, targets: Tensor, source_ids: Tensor | None, target_ids: Tensor | None) -> None:
    """Copies between tensors of words [parts, blocks, W] of any strides."""
    ids = [tensor for tensor in (source_ids, target_ids) if tensor is not None]
    check_integers(*ids)
    num_parts, _, num_words = sources.shape
    copy_blocks_kernel[(len(ids[0]), num_parts, triton.cdiv(num_words, WORDS_PER_PROGRAM))](
        sources,
        targets,
        source_ids,
        target_ids,
        *sources.stride()[:2],
        *targets.stride()[:2],
        NUM_WORDS=num_words,
        WORDS=WORDS_PER_PROGRAM,
        num_warps=NUM_WARPS,
    )


def _words(cache: Tensor) -> Tensor:
    """The cache as [2 L, N, W] of int32: bits are copied whatever they mean."""
    assert cache.dim() == 6 and cache.is_contiguous(), "[L, 2, N, kv heads, block size, head_dim]"
    return cache.flatten(3).view(torch.int32).flatten(0, 1)


def _staged_words(staging: Tensor, cache: Tensor, num_blocks: int) -> Tensor:
    """The staging buffer as [2 L, blocks, W] of int32."""
    assert staging.is_contiguous() and staging.dtype == cache.dtype, "contiguous and of the cache's type"
    assert len(staging) >= num_blocks and staging.shape == staging_shape(cache, len(staging))
    return staging.flatten(3).view(torch.int32).flatten(1, 2).transpose(0, 1)


def _build(name: str, *unused: str) -> KernelBuild:
    constants = {"NUM_WORDS": 8 * 32 * 128 // 2, "WORDS": WORDS_PER_PROGRAM} | dict.fromkeys(unused)
    pointers = {"sources": "i32", "targets": "i32", "source_ids": "i32", "target_ids": "i32"}
    return KernelBuild(
        name=name,
        kernel=copy_blocks_kernel,
        signature=signature(copy_blocks_kernel.arg_names, pointers, constants),
        constants=constants,
        num_warps=NUM_WARPS,
    )


BUILDS = (
    _build("copy_blocks"),
    _build("gather_blocks", "target_ids"),
    _build("scatter_blocks", "source_ids"),
)
