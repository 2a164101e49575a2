"""The machines use the harnesses of the packages that they drive."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / name) for name in ("fuzz", "sched", "loop")]
