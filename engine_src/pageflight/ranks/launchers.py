"""Launchers by their names."""

from __future__ import annotations

from pageflight.core.config import EngineConfig
from pageflight.ranks.launcher import Launcher, Progress


def open_launcher(config: EngineConfig, progress: Progress) -> Launcher:
    """What `config.launcher` names. `progress` is told what a start waits for. Raises ConfigError."""
    if config.launcher == "external":
        from pageflight.ranks.external_launcher import ExternalLauncher

        return ExternalLauncher(config, progress)
    if config.launcher == "ray":
        from pageflight.ranks.ray_launcher import RayLauncher

        return RayLauncher(config, progress)
    from pageflight.ranks.local_launcher import LocalLauncher

    return LocalLauncher()
