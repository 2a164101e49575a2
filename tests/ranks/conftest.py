"""Makes helper modules of other tests importable, and keeps what torchrun or an earlier engine has set from ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageflight.ranks.external_launcher import EVERY_RANK_JOINS

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), *(str(_TESTS / name) for name in ("loop", "runners", "clients"))]


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """A key, and machines that are missed soon; interfaces are chosen anew. Before what a module's tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEFLIGHT_RANK_KEY", "a key that only these tests have")
        patch.setenv("PAGEFLIGHT_RANK_GONE_S", "2")
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", EVERY_RANK_JOINS, "PAGEFLIGHT_RANK_KEY_FILE"):
            patch.delenv(name, raising=False)
        yield
