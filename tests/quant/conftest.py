"""The small checkpoint of tests/models serves here too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from small_checkpoint import make_checkpoint

__all__ = ["make_checkpoint"]
