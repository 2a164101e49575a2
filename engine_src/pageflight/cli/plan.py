"""`pageflight plan`: what a model needs, which GPUs hold it, and how fast they could be at best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pageflight.cli.console import output
from pageflight.cli.errors import CommandError
from pageflight.core.config import KVConfig
from pageflight.kv.capacity import free_memory
from pageflight.models.families import read_config
from pageflight.quant.forms import DTYPES
from pageflight_build.machine import cpu_flags, default_dtype
from pageflight_build.options import STEP_TOKENS
from pageflight_build.plan.cards import Card, Cards, parse_cards
from pageflight_build.plan.demand import (
    KV_BYTES,
    Demand,
    check_context,
    check_dtypes,
    default_kv_dtype,
    resolved_group_size,
)
from pageflight_build.source import resolve_checkpoint

if TYPE_CHECKING:
    from pageflight_build.plan.fit import Fit
    from pageflight_build.plan.planner import Plan
    from pageflight_build.plan.rule import SizePlan

_DEMAND = Demand(context=1)  # for its defaults


def plan(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder or hub id; its config.json is enough, weights are not fetched.")
    ] = None,
    parameters: Annotated[
        float, typer.Option(help="Instead of a checkpoint: number of parameters, such as 70e9. By the rule of thumb.")
    ] = 0,
    gpus: Annotated[
        str,
        typer.Option(
            help="What there is: 2xH100-94, 2x8xH100-80 (two machines), L40S, H100-94/1g.12gb (a MIG slice),"
            " 2x80GiB@3350GB/s, cpu@40GB/s."
            " Default: every card known, and how many of it are needed."
        ),
    ] = "",
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Precision of the weights: {', '.join(DTYPES)}. Default: bf16; on a CPU as for a build."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="int8, int4: inputs per scale, as for a build.")] = 0,
    kv_dtype: Annotated[
        str | None,
        typer.Option(help=f"Precision of the K/V cache: {', '.join(KV_BYTES)}. Default: that of the activations."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence; 0 is the model's own limit.")] = 0,
    concurrency: Annotated[int, typer.Option(help="Sequences of that length at once.")] = _DEMAND.concurrency,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that run at once, as for a build.")] = (
        _DEMAND.max_num_seqs
    ),
    max_num_tokens: Annotated[int, typer.Option(help="Tokens of one step, as for a build.")] = 0,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory for weights, one step and the K/V cache together.")
    ] = _DEMAND.gpu_memory_utilization,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say what a model needs and which GPUs hold it, before anything is bought, fetched or built.

    Weights, K/V, the largest pass and head room by card; how the model would be divided; how many blocks and sequences
    remain; and the speed that memory and data sheets allow at best. Ends with status 1 if the cards named by --gpus do
    not hold it.

    Examples:

        pageflight plan ./Llama-3.1-70B --gpus 2xH100-94 --context 8192 --concurrency 8
        pageflight plan ./Llama-3.1-8B --context 8192
        pageflight plan --parameters 70e9 --dtype bf16
    """
    cards = parse_cards(gpus, _this_machine) if gpus else None
    if (checkpoint is None) == (not parameters):
        raise CommandError("give either a checkpoint (its config.json is enough) or --parameters")
    if checkpoint is None:
        _plan_size(parameters, dtype or "bf16", cards, gpu_memory_utilization, as_json)
        return
    from pageflight_build.plan.planner import make_plan
    from pageflight_build.plan.report import as_json as plan_json
    from pageflight_build.plan.words import sentences, verdict

    folder = resolve_checkpoint(checkpoint, files=("config.json",))
    config = read_config(folder)
    native = "bf16" if cards is None or cards.card.has_bf16 else "fp32"
    dtype = dtype or native
    kv_dtype = kv_dtype or (default_kv_dtype(dtype) if native == "bf16" else "fp32")
    check_dtypes(dtype, kv_dtype)
    engine = "openvino" if cards is not None and cards.card.kind == "cpu" else "torch"
    demand = Demand(
        dtype=dtype,
        kv_dtype=kv_dtype,
        group_size=resolved_group_size(config, dtype, group_size),
        context=check_context(config, context),
        concurrency=concurrency,
        max_num_seqs=max_num_seqs,
        max_num_tokens=max_num_tokens or max(STEP_TOKENS[engine], max_num_seqs),
        gpu_memory_utilization=gpu_memory_utilization,
    )
    made = make_plan(config, demand, cards, checkpoint_bytes=_weight_files_bytes(folder))
    if as_json:
        output.print(json.dumps(plan_json(made), indent=1, ensure_ascii=False))
    else:
        output.print(_given_table(made.given) if made.given is not None else _fewest_table(made))
        _say(sentences(made))
    if made.given is not None and not made.holds:
        raise CommandError(verdict(made, made.given))


def _plan_size(parameters: float, dtype: str, cards: Cards | None, utilization: float, as_json: bool) -> None:
    from pageflight_build.plan.report import size_json
    from pageflight_build.plan.rule import plan_by_size
    from pageflight_build.plan.words import size_sentences, size_verdict

    KVConfig(gpu_memory_utilization=utilization)
    made = plan_by_size(parameters, dtype, cards, utilization)
    if as_json:
        output.print(json.dumps(size_json(made), indent=1, ensure_ascii=False))
    else:
        output.print(_size_table(made))
        _say(size_sentences(made))
    if made.given is not None and not made.holds:
        raise CommandError(size_verdict(made))


def _this_machine() -> Card:
    free = free_memory()
    has_bf16 = default_dtype(cpu_flags()) == "bf16"
    return Card(name="cpu", kind="cpu", memory_bytes=free.num_bytes, source=free.source, has_bf16=has_bf16)


def _weight_files_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _say(lines: list[str]) -> None:
    output.print()
    for line in lines:
        output.print(line)


def _given_table(fit: Fit) -> Table:
    from pageflight_build.plan.words import cards_of, gib, rate, split_named

    top = fit.ceilings
    rows = [
        ("split", split_named(fit.layout)),
        ("memory", gib(fit.card.memory_bytes)),
        ("weights", gib(fit.weight_bytes)),
        ("position tables", gib(fit.table_bytes)),
        ("largest pass", gib(fit.pass_bytes) if fit.pass_bytes else ""),
        ("rows", gib(fit.rows_bytes) if fit.rows_bytes else ""),
        ("reserved", gib(fit.reserved_bytes) if fit.reserved_bytes else ""),
        ("left outside", gib(fit.outside_bytes) if fit.outside_bytes else ""),
        ("K/V room", f"{gib(fit.kv_room_bytes)}: {fit.num_blocks:,} blocks, {fit.cache_tokens:,} tokens"),
        ("K/V asked for", gib(fit.kv_bytes)),
        ("head room" if fit.head_room_bytes >= 0 else "missing", gib(abs(fit.head_room_bytes))),
        ("sequences that fit", f"{fit.max_concurrency:,}"),
        ("decode ceiling, alone", rate(top.decode_alone_tokens_s)),
        ("decode ceiling, all", rate(top.decode_tokens_s)),
        ("prompt ceiling", rate(top.prefill_tokens_s)),
    ]
    of = ", the fullest card" if fit.layout.num_cards > 1 else ""
    title = f"{cards_of(fit)}{of}"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows:
        if value:
            table.add_row(name, f"{value} tokens/s" if name.endswith(("ceiling", "alone", "all")) else value)
    return table


def _fewest_table(made: Plan) -> Table:
    from pageflight_build.plan.words import cards_named, gib_number, rate

    title = "Fewest cards that hold it (GiB of the fullest card; tp: ranks, pp: stages)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("cards", "tp", "pp", "weights", "K/V room", "blocks", "seqs", "decode/s", "prompt/s"):
        table.add_column(name, justify="left" if name == "cards" else "right", no_wrap=True)
    for fit in (one for one in made.fits if one.card.kind == "gpu"):
        table.add_row(
            cards_named(fit.card, fit.layout.num_cards),
            str(fit.layout.tensor_parallel),
            str(fit.layout.pipeline),
            gib_number(fit.weight_bytes),
            gib_number(fit.kv_room_bytes),
            f"{fit.num_blocks:,}",
            f"{fit.max_concurrency:,}",
            rate(fit.ceilings.decode_tokens_s),
            rate(fit.ceilings.prefill_tokens_s),
        )
    return table


def _size_table(made: SizePlan) -> Table:
    from pageflight_build.plan.words import cards_named, gib, rate

    table = Table(title="By the rule of thumb", title_justify="left", box=None, pad_edge=False)
    for name in ("cards", "memory", "decode/s, alone"):
        table.add_column(name, justify="left" if name == "cards" else "right")
    for fit in (made.given,) if made.given is not None else made.fits:
        total = gib(fit.num_cards * fit.card.memory_bytes)
        table.add_row(cards_named(fit.card, fit.num_cards), total, rate(fit.decode_alone_tokens_s))
    return table
