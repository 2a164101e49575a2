"""The fixture of the module beside these tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from small_checkpoint import make_checkpoint

__all__ = ["make_checkpoint"]
