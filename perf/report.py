"""Turns result lines into a table and a plot.

    python -m perf.report perf/results/peers.jsonl --out perf/results/peers

writes peers.md and peers.png. Of several records of one engine, model and workload the last one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from perf import figures

Key = tuple[str, str]  # label, workload


def workload_of(record: figures.Record) -> str:
    """As written in a plan, without the number of requests: `uniq c=8 128→64`."""
    return f"{record['kind']} c={record['conc']} {record['prompt']}→{record['output']}"


def latest(records: Sequence[figures.Record], model: str) -> dict[Key, figures.Record]:
    """The figures of one model; single runs are left out where there are medians."""
    summaries = [record for record in records if record.get("record") != "run"]
    return {
        (record["label"], workload_of(record)): record for record in summaries or records if record["model"] == model
    }


def markdown(records: Sequence[figures.Record]) -> str:
    """One table for each model: output tokens/s, median time to first token, median time per further token."""
    parts = []
    for model in ordered(record["model"] for record in records):
        cells = latest(records, model)
        workloads = ordered(workload for _, workload in cells)
        parts.append(f"### {model}\n\nOutput tokens/s | TTFT p50 ms | TPOT p50 ms (share of the ceiling)\n")
        parts.append("| | " + " | ".join(workloads) + " |")
        parts.append("|---|" + "---|" * len(workloads))
        for label in ordered(label for label, _ in cells):
            row = [cell(cells.get((label, workload))) for workload in workloads]
            parts.append(f"| {label} | " + " | ".join(row) + " |")
        ratios = [line for record in cells.values() for line in ratio_lines(record)]
        parts.append("")
        parts.extend([*ratios, ""] if ratios else [])
    return "\n".join(parts)


def cell(record: figures.Record | None) -> str:
    """What the table says of one record."""
    if record is None:
        return "–"
    text = str(record["tok_s"])
    if "ttft_p50_ms" in record:
        text += f" / {record['ttft_p50_ms']} / {record['tpot_p50_ms']}"
    if "of_ceiling" in record:
        text += f" ({record['of_ceiling']:.0%})"
    if not (record.get("out_ok", True) and record.get("in_ok", True) and record.get("lengths_ok", True)):
        text += " **other lengths than asked for**"
    return text


def ratio_lines(record: figures.Record) -> list[str]:
    """How one of our figures compares."""
    if "to_best_peer" not in record and "triton_tax" not in record:
        return []
    parts = []
    if "to_best_peer" in record:
        parts.append(f"{record['to_best_peer']} × the best peer ({record['best_peer']})")
    if "to_best_served_peer" in record:
        parts.append(f"{record['to_best_served_peer']} × the best served peer")
    if "triton_tax" in record:
        parts.append(f"Triton tax {record['triton_tax']}")
    return [f"- {record['label']}, {workload_of(record)}: " + ", ".join(parts)]


def ordered(names: Iterable[str]) -> list[str]:
    """Distinct names in order of appearance."""
    return list(dict.fromkeys(names))


def plot(records: Sequence[figures.Record], path: Path) -> None:
    """Bars of output tokens/s, a panel for each model and workload, with a line where the ceiling is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (model, workload)
        for model in ordered(record["model"] for record in records)
        for workload in ordered(workload for _, workload in latest(records, model))
    ]
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.4 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (model, workload) in zip(axes.flat, panels, strict=False):
        bars = {label: record for (label, where), record in latest(records, model).items() if where == workload}
        colours = ["#76b900" if label.startswith(("pageflight", "engine")) else "#9aa0a6" for label in bars]
        axis.barh(range(len(bars)), [record["tok_s"] for record in bars.values()], color=colours)
        for height, record in enumerate(bars.values()):
            if "ceiling_tok_s" in record:
                axis.plot([record["ceiling_tok_s"]] * 2, [height - 0.4, height + 0.4], color="black", linewidth=1.5)
        axis.set_yticks(range(len(bars)), list(bars), fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{model}\n{workload}", fontsize=8)
        axis.set_xlabel("output tokens/s (line: ceiling)", fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    results: Annotated[list[Path], typer.Argument(help="Files of JSON lines.")],
    out: Annotated[Path, typer.Option(help="Name of the report without its ending.")] = Path("perf/results/report"),
) -> None:
    """Write OUT.md and OUT.png."""
    try:
        records = figures.read(results)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="RESULTS") from None
    if not records:
        raise typer.BadParameter("there are no records", param_hint="RESULTS")
    text = markdown(records)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(records, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    typer.run(main)
