"""The two consoles: answers go to standard output, everything about the work to standard error."""

from __future__ import annotations

import contextlib

from rich.console import Console

console = Console(stderr=True)
"""For people: progress, summaries, errors."""

output = Console(soft_wrap=True, highlight=False, markup=False)
"""For results: may be piped into a file."""


def tell(text: str) -> None:
    """A line about a server that serves. Where the terminal has gone it is lost: nobody's stream ends for that."""
    with contextlib.suppress(OSError, SystemExit):  # rich ends the program when a pipe breaks
        console.print(text, highlight=False, soft_wrap=True, markup=False)
