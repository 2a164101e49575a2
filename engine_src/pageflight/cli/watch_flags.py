"""The options that watch a core at work, as the command line spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pageflight.loop.watch import Watch

_PANEL = "Verification"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchFlags:
    """What the commands share that run an engine."""

    record: Annotated[
        Path | None,
        typer.Option(
            help="Record what the engine does, for `pageflight replay`; every core adds its instance, start and process"
            " number to the file's name.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    check_invariants: Annotated[
        int,
        typer.Option(
            help="Check every invariant of scheduler and cache each so many steps; 0: never. A core that breaks one is"
            " replaced.",
            min=0,
            rich_help_panel=_PANEL,
        ),
    ] = 0

    @property
    def watch(self) -> Watch:
        record = str(self.record.resolve()) if self.record is not None else ""
        return Watch(record=record, check_invariants=self.check_invariants)
