"""Helpers of other tests that the matrix puts together."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / name) for name in ("features", "backend", "clients", "runners")]

import triton_stub  # noqa: E402, F401  must come before what imports Triton's module
