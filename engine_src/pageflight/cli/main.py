"""The `pageflight` command: every subcommand, and how errors look."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer
from rich.markup import escape

from pageflight import __version__
from pageflight.cli.build import build
from pageflight.cli.chat import chat
from pageflight.cli.console import console
from pageflight.cli.errors import CommandError
from pageflight.cli.generate import generate
from pageflight.cli.inspect_repository import inspect
from pageflight.cli.join import join
from pageflight.cli.node import node
from pageflight.cli.plan import plan
from pageflight.cli.replay import replay
from pageflight.cli.serve import serve
from pageflight.cli.up import up
from pageflight.core.errors import PageflightError

app = typer.Typer(
    name="pageflight",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pageflight {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Turns a Hugging Face checkpoint into a Triton model repository and serves it.

    Build a repository, serve it, ask it:

        pageflight build ./my-model --name mine
        pageflight serve repositories/mine
        pageflight generate "Once upon a time" --max-tokens 50

    Or all of it at once, with a completion to see that it works: `pageflight up --checkpoint ./my-model`
    """


app.command()(build)
app.command()(serve)
app.command()(up)
app.command()(join)
app.command()(node)
app.command()(generate)
app.command()(chat)
app.command()(plan)
app.command()(inspect)
app.command()(replay)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status: 0, 1 for an error with its message, 2 for wrong usage, 130 for Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=given, prog_name="pageflight")
    except SystemExit as end:  # typer ends every command so; wrong usage is status 2, with the option's name
        return end.code if isinstance(end.code, int) else 0
    except (PageflightError, CommandError) as error:
        if "--debug" in given:
            traceback.print_exc()
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 0
    except Exception as error:  # our own bug: still one line, with the way to its traceback
        if "--debug" in given:
            raise
        shown = f"internal error: {type(error).__name__}: {error}; `pageflight --debug …` shows where"
        console.print(f"[bold red]error:[/] {escape(shown)}", highlight=False, soft_wrap=True)
        return 1
    return 0
