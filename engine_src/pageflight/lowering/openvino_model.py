"""A compiled OpenVINO decoder: our own K/V blocks, one asynchronous request, one step in flight.

Shapes as in `lowering.base`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import CompiledModel, Shape, Tensor  # type: ignore[import-untyped]

from pageflight.core.errors import ConfigError
from pageflight.lowering.base import StepInputs
from pageflight.lowering.touch_ahead import TouchAhead

_CACHE_KINDS = ("key_cache", "value_cache")
TOKEN_TILE = 64
"""Tokens that the CPU plugin's matrix products block together: 65 took a fifth to a half longer than 64."""
_CONTEXT_STEP = 32  # tokens of its blocks
_CONTEXT_GROWTH = 1.5


class OpenVinoModel:
    """Runs steps of one compiled graph. `keep` is what the graph's constants borrow their memory from."""

    def __init__(self, compiled: CompiledModel, num_layers: int, vocab_size: int, keep: list[object]) -> None:
        self.vocab_size, self.token_tile, self.replay_rows = vocab_size, TOKEN_TILE, 1
        self.num_threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self._compiled, self._keep = compiled, keep
        self._request = compiled.create_infer_request()
        self._ports = {port.get_any_name(): port for port in compiled.inputs}
        self._block_shapes: dict[str, tuple[list[int], Any]] = {}
        for layer in range(num_layers):
            for kind in _CACHE_KINDS:
                name = f"{kind}.{layer}"
                dims = list(self._ports[name].get_partial_shape())[1:]
                shape = [dim.get_length() for dim in dims]  # heads, tokens of a block, features with inline scales
                self._block_shapes[name] = (shape, self._ports[name].get_element_type())
        self.block_size = self._block_shapes["value_cache.0"][0][1]  # keys may carry scales along the tokens
        self.kv_bytes_per_block = sum(_num_bytes(*layout) for layout in self._block_shapes.values())
        self._blocks: list[NDArray[np.uint8]] = []  # per layer and kind, [num_blocks, bytes of a block]
        self._slots: list[NDArray[np.uint8]] = []  # the same on the host: of their own, though in the same memory here
        self._touching = TouchAhead(())
        self._num_logits = self._most_context = 0
        self._bound: dict[str, tuple[NDArray[Any], Tensor]] = {}  # tensors borrow the arrays of a pass: both must live

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """Create the K/V blocks (once). Raises ConfigError when memory does not suffice."""
        assert not self._blocks, "blocks are allocated once"
        for name, (shape, element) in self._block_shapes.items():
            try:
                blocks = np.zeros((num_blocks, _num_bytes(shape, element)), np.uint8)
                self._slots.append(np.zeros((num_host_blocks, blocks.shape[1]), np.uint8))
            except MemoryError:
                count = num_blocks + num_host_blocks
                raise ConfigError(
                    f"{count} blocks take {count * self.kv_bytes_per_block} bytes, more than there is memory"
                ) from None
            self._request.set_tensor(self._ports[name], Tensor(blocks, Shape([num_blocks, *shape]), element))
            self._blocks.append(blocks)
        self._touching = TouchAhead(self._blocks)

    def start(self, inputs: StepInputs) -> None:
        assert self._blocks, "allocate comes first"
        named = (
            ("ids", inputs.ids_T),
            ("positions", inputs.positions_T),
            ("take", inputs.take_L),
            ("past_lens", inputs.past_lens_S),
            ("token_begins", inputs.token_begins),
            ("block_indices", inputs.block_indices_N),
            ("block_begins", inputs.block_begins),
            ("max_context_len", np.array(self._context_bound(inputs.max_context_len), np.int32)),
        )
        self._num_logits = len(inputs.take_L)
        bound = self._bound
        for name, array in named:
            if name in bound and bound[name][0] is array:
                continue  # decode steps share most arrays with the step before
            tensor = Tensor(array, shared_memory=True)
            self._request.set_tensor(self._ports[name], tensor)
            if name == "block_indices":
                self._touching.reach(int(array.max()))
            bound[name] = (array, tensor)
        self._request.start_async()

    def _context_bound(self, longest: int) -> int:
        """What the plugin is told to be the longest context of a pass.

        Whenever it is told of a longer one than ever, its attention compiles its kernels anew, in every layer: block by
        block, while sequences grow. So it is told of much more then; loops go over what it is told otherwise.
        """
        if longest <= self._most_context:
            return longest
        self._most_context = -(-int(longest * _CONTEXT_GROWTH) // _CONTEXT_STEP) * _CONTEXT_STEP
        return self._most_context

    def wait(self) -> NDArray[np.float32]:
        self._request.wait()
        logits: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return logits.reshape(self._num_logits, self.vocab_size)

    def copy_blocks(self, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        for blocks in self._blocks:
            blocks[targets] = blocks[sources]

    def copy_out(self, blocks: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        for on_device, on_host in zip(self._blocks, self._slots, strict=True):
            on_host[slots] = on_device[blocks]

    def copy_in(self, slots: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        for on_device, on_host in zip(self._blocks, self._slots, strict=True):
            on_device[blocks] = on_host[slots]

    def close(self) -> None:
        """Free everything: first what reads memory, then the memory. The model cannot be used afterwards."""
        self._touching.close()
        self._request = self._compiled = None
        self._ports.clear()
        self._blocks.clear()
        self._slots.clear()
        self._bound.clear()
        self._keep.clear()


def _num_bytes(shape: list[int], element: Any) -> int:
    return int(np.prod(shape)) * int(element.bitwidth) // 8
