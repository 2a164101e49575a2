"""Putting a finished folder into its place in one step, so that nobody ever sees half of one."""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, on the same file system; removed at the end unless it was moved away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.building"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(staged: Path, target: Path) -> None:
    """Make `staged` appear as `target`. What was there is removed, after the change.

    Both names change hands at once (renameat2 of Linux) where the file system can do it; elsewhere the old folder is
    moved aside first, and moved back if the second step fails.
    """
    if not target.exists():
        os.rename(staged, target)
        return
    if _exchange(staged, target):
        shutil.rmtree(staged)
        return
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
    os.rename(target, aside)
    try:
        os.rename(staged, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside)


def link_or_copy(source: Path, target: Path) -> None:
    """Carry a folder tree over without copying its bytes where hard links work."""

    def carry(old: str, new: str) -> str:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)
        return new

    shutil.copytree(source, target, copy_function=carry)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where kernel or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)
