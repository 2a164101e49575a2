"""Puts the repository's root on the path: `perf` is run from there and is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
