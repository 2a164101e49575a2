"""Puts the repository's root on the path (`perf` is run from there and is not installed), and the tests' helpers."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent / "clients")]
