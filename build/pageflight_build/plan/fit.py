"""One layout on one kind of card: what takes the memory, how many blocks remain, whether that is enough."""

from __future__ import annotations

from dataclasses import dataclass

from pageflight.models.config import DecoderConfig
from pageflight_build.plan.cards import GIB, Card
from pageflight_build.plan.ceilings import Ceilings, ceilings_of
from pageflight_build.plan.demand import BLOCK_SIZE, Demand
from pageflight_build.plan.layouts import Layout
from pageflight_build.plan.shares import Holder, Share, shares_of

RESERVED_BYTES = GIB
"""What the engine leaves on a GPU for graphs and handles."""
CPU_FRACTION = 0.5
"""Of the memory that is free once the weights are there: what the engine gives to K/V blocks on a CPU."""
FP8_CAPABILITY = 89


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Bytes are of the card that has least left. `kv_bytes` is what is asked for, `kv_room_bytes` what there is for it.

    On a CPU a pass has the memory that blocks leave, and is not counted; nor are rows, which are small there.

    `head_room_bytes` is what remains of the budget beside all that was asked for, below 0 what is missing;
    `outside_bytes` is what the budget leaves out. `num_blocks`, `cache_tokens` and `max_concurrency` are what the
    engine would make of the room. `obstacle`: why the cards cannot do it at all.
    """

    card: Card
    layout: Layout
    obstacle: str | None
    weight_bytes: int
    table_bytes: int
    pass_bytes: int
    rows_bytes: int
    reserved_bytes: int
    kv_room_bytes: int
    kv_bytes: int
    head_room_bytes: int
    outside_bytes: int
    num_blocks: int
    max_concurrency: int
    ceilings: Ceilings

    @property
    def holds(self) -> bool:
        return self.obstacle is None and self.head_room_bytes >= 0

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE


def fit(config: DecoderConfig, demand: Demand, card: Card, layout: Layout) -> Fit:
    """What `layout` takes and leaves on each `card`."""
    shares = shares_of(config, demand, layout, holder_of(card, demand))
    asked = demand.concurrency * demand.blocks_per_sequence
    rooms = [_room(card, share, demand) for share in shares]
    tightest = min(range(len(shares)), key=lambda index: rooms[index] - asked * shares[index].block_bytes)
    share, room = shares[tightest], rooms[tightest]
    num_blocks = max(0, min(room // share.block_bytes for room, share in zip(rooms, shares, strict=True)))
    num_blocks = min(num_blocks, demand.max_num_seqs * demand.blocks_per_sequence)
    return Fit(
        card=card,
        layout=layout,
        obstacle=_obstacle(card, demand),
        weight_bytes=share.weight_bytes,
        table_bytes=share.table_bytes,
        pass_bytes=0 if card.kind == "cpu" else share.pass_bytes,
        rows_bytes=0 if card.kind == "cpu" else share.rows_bytes,
        reserved_bytes=0 if card.kind == "cpu" else RESERVED_BYTES,
        kv_room_bytes=max(0, room),
        kv_bytes=asked * share.block_bytes,
        head_room_bytes=room - asked * share.block_bytes,
        outside_bytes=card.memory_bytes - int(card.memory_bytes * _utilization(card, demand)),
        num_blocks=num_blocks,
        max_concurrency=num_blocks // demand.blocks_per_sequence,
        ceilings=ceilings_of(card, shares, demand),
    )


def holder_of(card: Card, demand: Demand) -> Holder:
    """How weights lie in the memory of `card`."""
    if card.kind != "cpu":
        return Holder()
    return Holder(
        is_gpu=False,
        keeps_both_forms=demand.dtype == "fp32",
    )


def _room(card: Card, share: Share, demand: Demand) -> int:
    """What blocks may take, by the engine's own rule; below 0 what is missing without any."""
    fixed = share.weight_bytes + share.table_bytes
    if card.kind == "cpu":
        left = card.memory_bytes - fixed
        return int(left * CPU_FRACTION) if left > 0 else left
    budget = int(card.memory_bytes * demand.gpu_memory_utilization)
    return budget - fixed - share.pass_bytes - share.rows_bytes - RESERVED_BYTES


def _utilization(card: Card, demand: Demand) -> float:
    return 1.0 if card.kind == "cpu" else demand.gpu_memory_utilization


def _obstacle(card: Card, demand: Demand) -> str | None:
    if "fp8" in (demand.dtype, demand.kv_dtype) and card.capability is not None and card.capability < FP8_CAPABILITY:
        have = f"{card.capability // 10}.{card.capability % 10}"
        return f"fp8 needs compute capability 8.9, {card.name} has {have}"
    return None
