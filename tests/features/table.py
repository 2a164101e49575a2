"""Writes docs/features.md from the features as data: `python tests/features/table.py docs/features.md`."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from features import FEATURES, Feature, is_same_choice, refusal

TITLES = {
    "request": "Features of a request",
    "engine": "Features of an engine",
    "precision": "Precisions",
    "not built": "Not in this build",
}
WORKS, REFUSED, ONE_OF_BOTH = "·", "✗", " "


def document() -> str:
    """The whole of docs/features.md."""
    lines = [
        "# Features together",
        "",
        "Written by `scripts/docs` from the data of the test that runs every pair (`tests/features`). A request with",
        "both features goes through the whole stack, beside others, and its answer is compared with a plain",
        "computation; or it is refused by name.",
        "",
    ]
    numbers = {feature.name: number for number, feature in enumerate(FEATURES, 1)}
    for group, title in TITLES.items():
        lines += [f"## {title}", "", "| | feature | asked for by |", "|---|---|---|"]
        lines += [f"| {numbers[f.name]} | {f.name} | {f.asks} |" for f in FEATURES if f.group == group]
        lines.append("")
    lines += ["## Pairs", "", "·: work together. ✗: refused with INVALID_ARG. Empty: two values of one setting.", ""]
    columns = [feature for feature in FEATURES if feature.group != "not built"]
    lines.append("| | | " + " | ".join(str(numbers[feature.name]) for feature in columns) + " |")
    lines.append("|---|---|" + "---|" * len(columns))
    for row in columns:
        cells = [_cell(row, column) if numbers[column.name] < numbers[row.name] else " " for column in columns]
        lines.append(f"| {numbers[row.name]} | {row.name} | " + " | ".join(cells) + " |")
    lines += ["", "What is not in this build is refused with everything. Refused besides:", ""]
    for one, other in combinations(columns, 2):
        if refusal(one, other):
            lines.append(f"- {one.name} with {other.name}: `{refusal(one, other)}…`")
    return "\n".join([*lines, ""])


def _cell(one: Feature, other: Feature) -> str:
    if is_same_choice(one, other):
        return ONE_OF_BOTH
    return REFUSED if refusal(one, other) else WORKS


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
