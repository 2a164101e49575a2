"""The secret that ranks and their leader share where they meet over a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pageflight.core.errors import ConfigError

KEY = "PAGEFLIGHT_RANK_KEY"
KEY_FILE = "PAGEFLIGHT_RANK_KEY_FILE"
LEAST_LENGTH = 16


def rank_key(environment: Mapping[str, str] = os.environ) -> bytes:
    """From the environment, or the file that it names. Raises ConfigError where there is none."""
    key, source = environment.get(KEY, ""), KEY
    if not key and environment.get(KEY_FILE):
        source = f"{KEY_FILE}={environment[KEY_FILE]}"
        try:
            key = Path(environment[KEY_FILE]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read: {error}") from None
    if not key:
        raise ConfigError(
            f"{KEY} is not set: ranks that dial in over a network need a key that all machines share, here or in a file"
            f" that {KEY_FILE} names; make one with `openssl rand -hex 32`"
        )
    if len(key) < LEAST_LENGTH:
        raise ConfigError(f"{source}: the key has {len(key)} characters, at least {LEAST_LENGTH} are needed")
    return key.encode()
