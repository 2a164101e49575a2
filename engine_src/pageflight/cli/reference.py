"""The command line as Markdown, from the commands themselves: `python -m pageflight.cli.reference > docs/cli.md`."""

from __future__ import annotations

import inspect
from typing import Any

import typer.main

from pageflight.cli.main import app


def cli_reference() -> str:
    """The whole of docs/cli.md."""
    group: Any = typer.main.get_command(app)
    parts = ["# Commands", "", "Written by `python -m pageflight.cli.reference`; a test keeps it in step.", ""]
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


if __name__ == "__main__":
    print(cli_reference(), end="")
