"""The operator's tenants file as a running core sees it: read again when it changes, the last good one kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from pageflight.core.errors import ConfigError
from pageflight.core.tenants import Tenants, read_tenants

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""How often the file is looked at."""


class TenantsFile:
    """`kept` is where the last good shares lie, beside the core's sockets: the next core may have to begin so."""

    def __init__(self, path: Path, kept: Path) -> None:
        self._path, self._kept = path, kept
        self._seen: tuple[int, ...] | None = None
        self._next_s = 0.0

    def load(self) -> Tenants:
        """The shares to begin with. Raises ConfigError for a bad file, unless an earlier core had a good one."""
        self._seen = self._signature()
        try:
            return self._read()
        except ConfigError as error:
            if not self._kept.exists():
                raise
            log.error("%s; the last good one stays in force", error)
            return msgspec.json.decode(self._kept.read_bytes(), type=Tenants)

    def poll(self, now_s: float) -> Tenants | None:
        """The new shares if the file has changed and is good. What is wrong with it is logged once."""
        if now_s < self._next_s:
            return None
        self._next_s = now_s + INTERVAL_S
        signature = self._signature()
        if signature == self._seen:
            return None
        self._seen = signature
        try:
            tenants = self._read()
        except ConfigError as error:
            log.error("%s; the last good one stays in force", error)
            return None
        log.info("tenants=%s was read again: %d tenants are named", self._path, len(tenants.by_name))
        return tenants

    def _read(self) -> Tenants:
        tenants = read_tenants(self._path)
        beside = self._kept.with_name(f"{self._kept.name}.new")
        try:
            beside.write_bytes(msgspec.json.encode(tenants))
            os.replace(beside, self._kept)
        except OSError as error:  # of use to a later core only; this one has them
            log.warning("%s: %s; a restarted core may begin with older shares", self._kept, error.strerror or error)
        return tenants

    def _signature(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_size, status.st_ino
