"""How a build tells what it is doing: an interface, nothing, or a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StageReport(Protocol):
    """Handed to a stage while it runs."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` units of this stage are finished."""


class BuildProgress(Protocol):
    """Handed to a build."""

    @contextmanager
    def stage(self, title: str) -> Iterator[StageReport]:
        """One stage, from entering to leaving."""
        raise AssertionError("a protocol")

    def done(self, title: str, summary: str) -> None:
        """A stage ended well."""


class Silent:
    """For tests and scripts."""

    @contextmanager
    def stage(self, title: str) -> Iterator[StageReport]:
        yield self

    def advance(self, done: int, total: int) -> None: ...

    def done(self, title: str, summary: str) -> None: ...


class Terminal:
    """A bar per stage that becomes one line of summary; without a terminal only the summaries are printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()

    @contextmanager
    def stage(self, title: str) -> Iterator[StageReport]:
        self._started = time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            yield _Bar(progress, title)

    def done(self, title: str, summary: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(
            f"  [green]✓[/] {title:<10} {summary} [dim]({seconds:.1f} s)[/]", highlight=False, soft_wrap=True
        )


class _Bar:
    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)
