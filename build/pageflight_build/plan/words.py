"""A plan in plain sentences."""

from __future__ import annotations

from pageflight_build.options import STEP_TOKENS
from pageflight_build.plan.cards import GIB, MIB, Card
from pageflight_build.plan.demand import BLOCK_SIZE, Demand, default_kv_dtype
from pageflight_build.plan.fit import CPU_FRACTION, Fit
from pageflight_build.plan.layouts import MOST_CARDS, Layout
from pageflight_build.plan.planner import Plan
from pageflight_build.plan.rule import SizePlan

RULE = "P · 4 / (32 / Q) · 1.2"


def gib(num_bytes: float) -> str:
    """Binary gigabytes, as drivers count memory."""
    return f"{gib_number(num_bytes)} GiB" if abs(num_bytes) >= GIB / 10 else f"{num_bytes / MIB:,.0f} MiB"


def gib_number(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f}"


def billions(num_parameters: float) -> str:
    return f"{num_parameters / 1e9:.3g} billion" if num_parameters >= 1e8 else f"{num_parameters / 1e6:.3g} million"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def cards_named(card: Card, num_cards: int, num_machines: int = 1) -> str:
    named = card.name if num_cards == 1 else f"{num_cards} × {card.name}"
    return named if num_machines == 1 else f"{named} on {num_machines} machines"


def cards_of(fit: Fit) -> str:
    return cards_named(fit.card, fit.layout.num_cards, fit.layout.nodes)


def split_named(layout: Layout) -> str:
    parts = []
    if layout.tensor_parallel > 1:
        parts.append(f"tensor parallel {layout.tensor_parallel}")
    if layout.pipeline > 1:
        parts.append(f"{layout.pipeline} stages")
    return ", ".join(parts) or "whole"


def rate(tokens_s: float | None) -> str:
    """Tokens a second; empty where the card's speed is unknown."""
    if tokens_s is None:
        return ""
    return f"{tokens_s:,.0f}" if tokens_s >= 10 else f"{tokens_s:.2g}"


def sentences(plan: Plan) -> list[str]:
    """What is needed, what holds it and why, what the ceilings are, and what else would do."""
    demand = plan.demand
    found = [
        f"{billions(plan.config.num_parameters)} parameters in {demand.dtype} take {gib(plan.weight_bytes)}."
        f" K/V in {demand.kv_dtype} takes {plan.kv_bytes_per_token:,} bytes a token:"
        f" {gib(plan.kv_bytes)} for {counted(demand.concurrency, 'sequence')} of {demand.context:,} tokens.",
        f"The published rule M = {RULE} says {plan.rule_bytes / 1e9:,.1f} GB; weights and this K/V are"
        f" {(plan.weight_bytes + plan.kv_bytes) / 1e9:,.1f} GB.",
    ]
    if plan.checkpoint_bytes:
        found.append(f"The checkpoint's own files are {gib(plan.checkpoint_bytes)}.")
    if plan.given is None:
        return [*found, *_of_any(plan)]
    return [*found, *_of_given(plan, plan.given)]


def verdict(plan: Plan, given: Fit) -> str:
    """One sentence: whether the given cards hold it, and what is missing."""
    named, many = cards_of(given), given.layout.num_cards > 1
    if given.obstacle is not None:
        return f"{named} cannot do it: {given.obstacle}."
    if given.holds:
        beside = "beside all that" if plan.demand.concurrency > 1 else "beside that"
        return f"{named} {'hold' if many else 'holds'} it, with {gib(given.head_room_bytes)} to spare {beside}."
    what = "the fullest card misses" if many else "it misses"
    return f"{named} {'do' if many else 'does'} not hold it: {what} {gib(-given.head_room_bytes)}."


def _of_any(plan: Plan) -> list[str]:
    alone = [one.card.name for one in plan.fits if one.layout.num_cards == 1 and one.card.kind == "gpu"]
    if alone:
        found = [f"One card is enough of: {', '.join(alone)}."]
    elif plan.fits:
        best = min(plan.fits, key=lambda one: one.layout.num_cards)
        found = [f"No single card holds it. The fewest are {cards_of(best)}."]
    else:
        return [f"No card of the table holds it, up to {MOST_CARDS} of them: ask for less context, or a smaller dtype."]
    sliced = [one.card.name for one in plan.fits if one.card.kind == "slice"]
    if sliced:
        found.append(f"One slice is enough of: {', '.join(sliced)}.")
    divided = max((one.layout for one in plan.fits), key=lambda layout: layout.num_cards)
    return found + _why_split(divided)


def _of_given(plan: Plan, given: Fit) -> list[str]:
    card, layout = given.card, given.layout
    found = [verdict(plan, given)]
    if given.obstacle is None:
        found.append(_memory(plan, given))
        found += _why_split(layout)
    if card.kind == "slice":
        found.append("A slice reaches no other slice's memory: several of them are several instances, never one model.")
    if given.holds:
        found += [_ceiling(plan, given), *_fewer(plan, given), *_how(plan, given)]
    else:
        found += _instead(plan, given)
    return found


def _memory(plan: Plan, given: Fit) -> str:
    each = "Each of the fullest cards has" if given.layout.num_cards > 1 else "It has"
    if given.card.kind == "cpu":
        rule = f"of the rest the engine gives {CPU_FRACTION:.0%} to K/V"
        source = f" ({given.card.source})" if given.card.source else ""
        start = f"There are {gib(given.card.memory_bytes)}{source}: weights {gib(given.weight_bytes)}"
        start += f", position tables {gib(given.table_bytes)}; {rule}"
    else:
        budget = given.card.memory_bytes - given.outside_bytes
        start = (
            f"{each} {gib(given.card.memory_bytes)}, of which {plan.demand.gpu_memory_utilization:.0%} are"
            f" {gib(budget)}: weights {gib(given.weight_bytes)}, position tables {gib(given.table_bytes)}, the largest"
            f" pass {gib(given.pass_bytes)}, tokens, scores and counts of {plan.demand.max_num_seqs} rows"
            f" {gib(given.rows_bytes)}, {gib(given.reserved_bytes)} kept for graphs and handles"
        )
    return (
        f"{start}. {gib(given.kv_room_bytes)} remain for K/V: {counted(given.num_blocks, 'block')},"
        f" {given.cache_tokens:,} tokens, {counted(given.max_concurrency, 'sequence')} of {plan.demand.context:,}"
        f" (at most {plan.demand.max_num_seqs} run at once)."
    )


def _why_split(layout: Layout) -> list[str]:
    found = []
    if layout.tensor_parallel > 1:
        found.append(
            "Inside a machine every layer is divided by heads (tensor parallel), because then a step reads the weights"
            " of all cards at the same time."
        )
    if layout.pipeline > 1:
        where = "across machines" if layout.nodes > 1 else "where heads cannot be divided further"
        found.append(
            f"By layers (pipeline stages) it is divided {where}: stages tell each other little, but one sequence waits"
            " for all of them in turn."
        )
    return found


def build_command(demand: Demand, fit: Fit) -> str | None:
    """The build that a fit on several GPUs stands for; None for one card, whose build needs no words, and for cards
    that do not hold it."""
    layout = fit.layout
    if not fit.holds or layout.num_cards == 1:
        return None
    options: dict[str, object] = {"engine": "torch", "dtype": demand.dtype}
    if demand.kv_dtype != default_kv_dtype(demand.dtype):
        options["kv-dtype"] = demand.kv_dtype
    if demand.group_size:
        options["group-size"] = demand.group_size
    options |= {"max-model-len": demand.context, "tensor-parallel": layout.tensor_parallel}
    if layout.pipeline > 1:
        options["pipeline-parallel"] = layout.pipeline
    if layout.nodes > 1:
        options |= {"nodes": layout.nodes, "launcher": "external"}
    defaults = Demand(context=demand.context, max_num_tokens=max(STEP_TOKENS["torch"], demand.max_num_seqs))
    for name in ("max_num_seqs", "max_num_tokens", "gpu_memory_utilization"):
        if getattr(demand, name) != getattr(defaults, name):
            options[name.replace("_", "-")] = getattr(demand, name)
    return " ".join(["pageflight build CHECKPOINT", *(f"--{name} {value}" for name, value in options.items())])


def _how(plan: Plan, given: Fit) -> list[str]:
    command = build_command(plan.demand, given)
    if command is None:
        return []
    stages, nodes = given.layout.pipeline, given.layout.nodes
    found = [f"Build it with: {command}"]
    if nodes > 1:
        each = counted(stages // nodes, "stage")
        found.append(f"Each machine has {each}; ranks of all but the first are to be started there.")
    return found


def _ceiling(plan: Plan, given: Fit) -> str:
    top, demand = given.ceilings, plan.demand
    if top.decode_alone_tokens_s is None:
        return f"The bandwidth of {given.card.name} is not known, so there is no ceiling; add it, as in cpu@40GB/s."
    text = f"Decoding cannot exceed {rate(top.decode_alone_tokens_s)} tokens/s for one sequence of {demand.context:,}"
    if demand.concurrency > 1:
        text += f" and {rate(top.decode_tokens_s)} for {demand.concurrency}"
    reason = "every step reads all weights and the K/V" if top.decode_bound == "memory" else "the products take so long"
    text += f": {reason}."
    if top.prefill_tokens_s is not None:
        text += f" Prompts cannot exceed {rate(top.prefill_tokens_s)} tokens/s in steps of {demand.max_num_tokens}."
    return text


def _fewer(plan: Plan, given: Fit) -> list[str]:
    if not plan.fits or plan.fits[0].layout.num_cards >= given.layout.num_cards:
        return []
    best = plan.fits[0]
    return [
        f"{cards_named(best.card, best.layout.num_cards)} would do, with room for"
        f" {counted(best.max_concurrency, 'such sequence')}; the other cards could serve further instances."
    ]


def _instead(plan: Plan, given: Fit) -> list[str]:
    found = []
    if given.obstacle is None and given.max_concurrency:
        found.append(f"{counted(given.max_concurrency, 'sequence')} of {plan.demand.context:,} tokens would fit.")
    elif given.obstacle is None:
        tokens = given.num_blocks // plan.demand.concurrency * BLOCK_SIZE
        if tokens:
            found.append(f"{counted(plan.demand.concurrency, 'sequence')} of {tokens:,} tokens would fit.")
    if plan.fits:
        best = plan.fits[0]
        found.append(f"{cards_of(best)} would hold it ({split_named(best.layout)}).")
    for dtype, other in plan.instead.items():
        room = counted(other.max_concurrency, "such sequence")
        found.append(f"In {dtype}, with weights of {gib(other.weight_bytes)} a card, these would: room for {room}.")
    if not found:
        found.append("Nothing near would do on these cards: take larger ones, or a smaller model.")
    return found


def size_sentences(plan: SizePlan) -> list[str]:
    """The same for a plan without shapes."""
    found = [
        f"{billions(plan.num_parameters)} parameters in {plan.dtype} take {gib(plan.weight_bytes)}; the published rule"
        f" M = {RULE} says {plan.rule_bytes / 1e9:,.1f} GB with everything.",
        "Without the model's shapes there is no figure for K/V, and none for the split: give its config.json.",
    ]
    if plan.given is not None:
        found.append(size_verdict(plan))
    if plan.fits and (plan.given is None or plan.fits[0].num_cards != plan.given.num_cards):
        best = min(plan.fits, key=lambda one: one.num_cards)
        named = cards_named(best.card, best.num_cards)
        found.append(f"The fewest that hold it by the rule, in {plan.gpu_memory_utilization:.0%} of memory: {named}.")
    return found


def size_verdict(plan: SizePlan) -> str:
    assert plan.given is not None
    given = plan.given
    named, many = cards_named(given.card, given.num_cards), given.num_cards > 1
    if given.holds:
        return f"{named} {'hold' if many else 'holds'} it by the rule."
    return f"{named} {'do' if many else 'does'} not hold it by the rule: {gib(given.missing_bytes)} are missing."
