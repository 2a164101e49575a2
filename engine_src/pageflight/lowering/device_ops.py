"""The decoder's operations on an NVIDIA GPU: our kernels around torch's matrix products.

Shapes: T packed tokens, S sequences, L rows of logits, M columns of the block table, D head_dim; the cache is
[layers, 2, num_blocks, kv heads, block size, D].

The definition names one operation at a time; what a kernel does together is held back until it is asked for: a sum
until it is normalised, heads until they attend. In Triton's interpreter the same code runs on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pageflight.kernels.activation import silu_mul
from pageflight.kernels.attention_decode import SplitWorkspace, decode_attention
from pageflight.kernels.attention_mixed import mixed_attention
from pageflight.kernels.kv_write import rope_and_write
from pageflight.kernels.norm import add_rms_norm, rms_norm
from pageflight.lowering.device_weight import DeviceWeight
from pageflight.models.config import DecoderConfig
from pageflight.models.rope import rope_tables


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceInputs:
    """One forward pass, all tensors int32 on the device.

    A pass with `lens_S` decodes: one token a row, `lens_S` keys that it sees, its own included (0: padding). A pass
    with `token_begins` [S + 1] and `past_lens_S` may have chunks of at most `max_query_len` tokens. `take_L` picks the
    tokens whose logits are wanted; None takes all.
    """

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor  # -1: padding
    tables_SM: Tensor
    lens_S: Tensor | None = None
    token_begins: Tensor | None = None
    past_lens_S: Tensor | None = None
    max_query_len: int = 1
    take_L: Tensor | None = None
    workspace: SplitWorkspace | None = None


@dataclass(slots=True, eq=False)
class _Sum:
    """x + y, not added yet: normalising does that on the way. `x` is the residual, which then holds the sum."""

    x: Tensor
    y: Tensor | None

    def value(self) -> Tensor:
        if self.y is not None:
            self.x, self.y = self.x + self.y, None
        return self.x


@dataclass(frozen=True, slots=True, eq=False)
class _Heads:
    """A part of a fused qkv, which is turned and written as a whole."""

    qkv: Tensor


Value = Tensor | _Sum | _Heads


class DeviceOps:
    """Computes one pass at a time: `prepare` it, then run the decoder.

    The residual stream is changed in place where a sum is normalised: a value is used by one operation after that.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, DeviceWeight],
        *,
        num_positions: int,
        device: torch.device,
    ) -> None:
        self._config, self._weights = config, weights
        self.cache: Tensor | None = None
        tables = rope_tables(config, num_positions)
        self._cosines, self._sines = (torch.from_numpy(table).to(device) for table in tables)
        self._scale = config.head_dim**-0.5
        self._pass: DeviceInputs | None = None

    def prepare(self, inputs: DeviceInputs) -> None:
        self._pass = inputs

    # --- operations of the decoder ---

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self._pass is not None, "prepare comes first"
        return self._pass.ids_T, self._pass.positions_T, self._pass.take_L

    def embed(self, ids: Tensor, weight: str) -> Tensor:
        return functional.embedding(ids, self._weights[weight].values)

    def take(self, x: Value, rows: Tensor | None) -> Tensor:
        value = _tensor(x)
        return value if rows is None else value[rows]

    def rope_rows(self, positions: Tensor) -> None:
        """Heads are turned when they attend."""

    def rms_norm(self, x: Value, weight: str, eps: float) -> Tensor:
        if isinstance(x, _Sum) and x.y is not None:
            y, x.y = x.y, None
            return add_rms_norm(y, x.x, self._weights[weight].values, eps)
        return rms_norm(_tensor(x), self._weights[weight].values, eps)

    def linear(self, x: Value, weight: str, bias: str | None = None) -> Tensor:
        return self._weights[weight].product(_tensor(x), None if bias is None else self._weights[bias].values)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[_Heads, ...]:
        return tuple(_Heads(x) for _ in sizes)

    def rope(self, x: _Heads, rows: None, num_heads: int) -> _Heads:
        return x

    def paged_attention(self, layer: int, q: _Heads, k: _Heads, v: _Heads) -> Tensor:
        c, inputs = self._config, self._pass
        assert self.cache is not None and inputs is not None, "allocate and prepare come first"
        assert q.qkv is k.qkv is v.qkv, "q, k and v of one product"
        qkv, (keys, values) = q.qkv, self.cache[layer]
        heads = (len(qkv), c.num_heads, c.head_dim)
        queries = qkv[:, : c.q_size].view(heads)
        rope_and_write(queries, keys, values, qkv, self._cosines, self._sines, inputs.positions_T, inputs.slots_T)
        attended = qkv.new_empty(heads)
        if inputs.lens_S is not None:
            decode_attention(
                attended,
                queries,
                keys,
                values,
                inputs.tables_SM,
                inputs.lens_S,
                scale=self._scale,
                workspace=inputs.workspace,
            )
        else:
            assert inputs.token_begins is not None and inputs.past_lens_S is not None
            mixed_attention(
                attended,
                queries,
                keys,
                values,
                inputs.tables_SM,
                inputs.token_begins,
                inputs.past_lens_S,
                max_query_len=inputs.max_query_len,
                scale=self._scale,
            )
        return attended.flatten(1)

    def gated_linear(self, x: Value, weight: str, bias: str | None = None) -> Tensor:
        return silu_mul(self.linear(x, weight, bias))

    def add(self, a: Value, b: Tensor) -> _Sum:
        return _Sum(_tensor(a), b)


def _tensor(x: Value) -> Tensor:
    assert not isinstance(x, _Heads), "heads only attend"
    return x.value() if isinstance(x, _Sum) else x
