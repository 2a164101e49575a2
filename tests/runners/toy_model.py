"""A CompiledModel small enough to check by eye: its logits say what the K/V blocks hold."""

from __future__ import annotations

import numpy as np

from pageflight.lowering.base import StepInputs


class ToyModel:
    """Keeps (token, position) of every slot of its blocks; the next id is a hash of all tokens of a sequence, in order.

    A wrong block, position, length or copy gives another id, so that greedy text equals `continuation` only when
    tables, chunks and copies were right.
    """

    kv_bytes_per_block = 64

    def __init__(self, vocab_size: int = 97, block_size: int = 4) -> None:
        self.vocab_size, self.block_size = vocab_size, block_size
        self.token_tile = self.replay_rows = self.num_threads = 1
        self.blocks = self.slots = np.zeros((0, block_size), np.int64)
        self.inputs: StepInputs | None = None
        self.closed = False

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        assert not self.blocks.size
        self.blocks = np.full((num_blocks, self.block_size), -1, np.int64)
        self.slots = np.full((num_host_blocks, self.block_size), -1, np.int64)

    def start(self, inputs: StepInputs) -> None:
        assert self.inputs is None
        self.inputs = inputs

    def wait(self) -> np.ndarray:
        inputs, self.inputs = self.inputs, None
        assert inputs is not None
        rows = []
        longest = 0
        for s in range(inputs.past_lens_S.size):
            past = int(inputs.past_lens_S[s])
            first, last = int(inputs.token_begins[s]), int(inputs.token_begins[s + 1])
            table = inputs.block_indices_N[inputs.block_begins[s] : inputs.block_begins[s + 1]]
            assert table.size == -(-(past + last - first) // self.block_size)
            longest = max(longest, past + last - first)
            for packed in range(first, last):
                position = past + packed - first
                assert inputs.positions_T[packed] == position
                self.blocks[table[position // self.block_size], position % self.block_size] = inputs.ids_T[packed]
                if packed in inputs.take_L:
                    seen = self.blocks[table].ravel()[: position + 1]
                    assert (seen >= 0).all(), "a slot is read that was never written"
                    rows.append(self.logits(seen.tolist()))
        assert inputs.max_context_len == longest
        assert inputs.take_L.tolist() == sorted(inputs.take_L.tolist())
        out = np.array(rows, np.float32).reshape(-1, self.vocab_size)
        out.setflags(write=False)
        return out

    def logits(self, tokens: list[int]) -> np.ndarray:
        return np.random.default_rng(tokens).standard_normal(self.vocab_size).astype(np.float32)

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[-count:]

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self.blocks[targets] = self.blocks[sources]

    def copy_out(self, blocks: np.ndarray, slots: np.ndarray) -> None:
        self.slots[slots] = self.blocks[blocks]

    def copy_in(self, slots: np.ndarray, blocks: np.ndarray) -> None:
        self.blocks[blocks] = self.slots[slots]

    def close(self) -> None:
        self.closed = True
