"""The plan: every way to hold a model that was asked about, and the one with the fewest cards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight.quant.sharding import input_unit
from pageflight_build.plan.cards import KNOWN, Card, Cards
from pageflight_build.plan.demand import BLOCK_SIZE, Demand, resolved_group_size
from pageflight_build.plan.fit import Fit, fit, holder_of
from pageflight_build.plan.layouts import Layout, layout_of, layouts
from pageflight_build.plan.rule import DTYPE_BITS, published_rule_bytes
from pageflight_build.plan.shares import Holder, kv_bytes_per_block, stored_bytes

SMALLER_DTYPES = ("fp8", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`given` is the fit of the cards that were named, if any were.

    `fits`: of every kind of card that was looked at, the fewest that hold it. `instead`: where the given cards do not
    hold it, those of weights in smaller dtypes, by dtype, that they do hold.
    """

    config: DecoderConfig
    demand: Demand
    checkpoint_bytes: int
    given: Fit | None
    fits: tuple[Fit, ...]
    instead: dict[str, Fit] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        return stored_bytes(self.config, self.demand.dtype, self.demand.group_size)

    @property
    def kv_bytes_per_token(self) -> int:
        holder = Holder() if self.given is None else holder_of(self.given.card, self.demand)
        return kv_bytes_per_block(self.config, self.demand.kv_dtype, self.config.num_layers, holder) // BLOCK_SIZE

    @property
    def kv_bytes(self) -> int:
        """Of all that was asked for, in one copy."""
        demand = self.demand
        return demand.concurrency * demand.blocks_per_sequence * BLOCK_SIZE * self.kv_bytes_per_token

    @property
    def rule_bytes(self) -> float:
        return published_rule_bytes(self.config.num_parameters, DTYPE_BITS[self.demand.dtype])

    @property
    def holds(self) -> bool:
        """Whether the given cards hold it, or, where none were given, any do."""
        return self.given.holds if self.given is not None else bool(self.fits)


def make_plan(config: DecoderConfig, demand: Demand, cards: Cards | None, *, checkpoint_bytes: int = 0) -> Plan:
    """Raises ConfigError for cards that the model cannot be divided among."""
    if cards is None:
        known = [card for card in KNOWN.values() if card.kind == "gpu"]
        found = [fewest(config, demand, card) for card in known]
        sliced = [fewest(config, demand, card) for card in KNOWN.values() if card.kind == "slice"]
        fits = tuple(one for one in (*found, *sliced) if one is not None)
        return Plan(config=config, demand=demand, checkpoint_bytes=checkpoint_bytes, given=None, fits=fits)
    given = fit(config, demand, cards.card, _given_layout(config, demand, cards))
    best = fewest(config, demand, cards.card)
    plan = Plan(
        config=config,
        demand=demand,
        checkpoint_bytes=checkpoint_bytes,
        given=given,
        fits=() if best is None else (best,),
    )
    return plan if given.holds else _with_alternatives(plan, cards)


def fewest(config: DecoderConfig, demand: Demand, card: Card) -> Fit | None:
    """The fit with the fewest of these cards that holds; None where none does."""
    unit = input_unit(demand.dtype, demand.group_size)
    tried = layouts(config, unit) if card.kind == "gpu" else iter((Layout(),))
    fits = (fit(config, demand, card, layout) for layout in tried)
    return next((found for found in fits if found.holds), None)


def _given_layout(config: DecoderConfig, demand: Demand, cards: Cards) -> Layout:
    if cards.card.kind != "gpu":
        return Layout()
    unit = input_unit(demand.dtype, demand.group_size)
    layout = layout_of(config, unit, cards.count, cards.num_machines)
    if layout is None:
        raise ConfigError(
            f"gpus={cards.count}x{cards.card.name}: {config.num_heads} heads and {config.num_layers} layers cannot be"
            f" divided among {cards.count} cards; take another number of them"
        )
    return layout


def _with_alternatives(plan: Plan, cards: Cards) -> Plan:
    found = {}
    for dtype in SMALLER_DTYPES:
        if DTYPE_BITS[dtype] >= DTYPE_BITS[plan.demand.dtype]:
            continue
        demand = replace(plan.demand, dtype=dtype, group_size=resolved_group_size(plan.config, dtype, 0))
        try:
            tried = fit(plan.config, demand, cards.card, _given_layout(plan.config, demand, cards))
        except ConfigError:  # its groups do not fit so many ranks
            continue
        if tried.holds:
            found[dtype] = tried
    return replace(plan, instead=found)
