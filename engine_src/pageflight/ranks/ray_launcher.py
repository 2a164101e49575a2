"""Ranks that Ray starts."""

from __future__ import annotations

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.ranks.launcher import Launcher, Progress


def ray_launcher(config: EngineConfig, progress: Progress) -> Launcher:
    """Raises ConfigError where Ray is not installed."""
    raise ConfigError(f"launcher={config.launcher!r}: Ray is not here; pip install 'pageflight[ray]'")
