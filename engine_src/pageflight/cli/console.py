"""The two consoles: answers go to standard output, everything about the work to standard error."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True)
"""For people: progress, summaries, errors."""

output = Console(soft_wrap=True, highlight=False, markup=False)
"""For results: may be piped into a file."""
