"""What the documentation says about commands, options and models, written from the code: scripts/docs calls it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import typer.main

from pageflight.cli.main import app
from pageflight.core import wire


def cli_reference() -> str:
    """The whole of docs/cli.md."""
    group: Any = typer.main.get_command(app)
    parts = ["# Commands", "", "Written by `scripts/docs` from the commands themselves.", ""]
    parts += [*_text(group), "", *_options(group), ""]
    for name, command in group.commands.items():
        parts += [f"## pageflight {name}", "", *_usage(name, command), "", *_text(command), "", *_options(command), ""]
    parts += ["## Exit status", "", *_EXIT_STATUS, ""]
    return "\n".join(parts)


_EXIT_STATUS = (
    "| status | meaning |",
    "|---|---|",
    "| 0 | done |",
    "| 1 | an error, told in one line with what to do next; `pageflight --debug …` shows the traceback |",
    "| 2 | wrong usage: an unknown option, a missing argument |",
    "| 130 | interrupted by Ctrl-C |",
)


def _usage(name: str, command: Any) -> list[str]:
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    shown = [item.name if item.required else f"[{item.name}]" for item in arguments]
    lines = [f"    pageflight {name} [options] {' '.join(shown)}".rstrip(), ""]
    lines += [f"- `{item.name}`: {item.help}" for item in arguments]
    return lines


def _text(command: Any) -> list[str]:
    """The help text; the indented lines of examples become code."""
    return [line.rstrip() for line in inspect.cleandoc(command.help or "").splitlines()]


def _options(command: Any) -> list[str]:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for item in command.params:
        if item.param_type_name != "option":
            continue
        names = ", ".join(f"`{name}`" for name in [*item.opts, *item.secondary_opts])
        rows.append(f"| {names} | {_default(item)} | {(item.help or '').replace('|', '/')} |")
    return rows


def _default(item: Any) -> str:
    value = item.default
    if value is None or callable(value) or (item.is_flag and not item.secondary_opts) or value == ():
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def options_table() -> str:
    """Every option of a request, as the models check it."""
    rows = ["| option | type | limit | meaning |", "|---|---|---|---|"]
    for option in wire.OPTIONS.values():
        shape = "" if option.dims == wire.SCALAR else " list"
        limit = f"not in this release: {option.unsupported}" if option.unsupported else option.limit
        rows.append(
            f"| `{option.name}` | {option.dtype}{shape} | {limit.removeprefix('must be ')} | {option.meaning} |"
        )
    return "\n".join(rows)


def outputs_table() -> str:
    """Every output of the text models."""
    rows = ["| output | type | meaning |", "|---|---|---|"]
    for tensor in wire.TEXT_OUTPUTS:
        shape = f" [{', '.join(str(size) for size in tensor.dims)}]"
        rows.append(f"| `{tensor.name}` | {tensor.dtype}{shape} | {tensor.meaning} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """A document whose blocks between `<!-- NAME -->` and `<!-- /NAME -->` are written anew."""
    for name, table in (("options", options_table), ("outputs", outputs_table)):
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        parts = block.split(text)  # groups come between: text, opening, closing, text …
        text = "".join(f"{part}{table()}\n" if index % 3 == 1 else part for index, part in enumerate(parts))
    return text


def write(docs: Path) -> None:
    """Bring the generated parts of the folder `docs` up to date."""
    (docs / "cli.md").write_text(cli_reference(), encoding="utf-8")
    clients = docs / "clients.md"
    clients.write_text(with_tables(clients.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
