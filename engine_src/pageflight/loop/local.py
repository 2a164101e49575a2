"""A front and its own core without Triton: for `pageflight generate --local`, benchmarks and tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.loop.address import CoreAddress, private_address
from pageflight.loop.core_process import CoreSpec, core_command
from pageflight.loop.devices import cores_of, environment_of
from pageflight.loop.front import Front
from pageflight.loop.observer import Observer, SilentObserver
from pageflight.loop.open_sequence import TextSource
from pageflight.loop.supervisor import Supervisor, SupervisorConfig
from pageflight.loop.watch import Watch
from pageflight.text.tokenizer import Tokenizer


def make_supervisor(
    spec: CoreSpec, address: CoreAddress, *, python: str = "", config: SupervisorConfig | None = None
) -> Supervisor:
    """A supervisor (not started yet) of a core that runs `spec` on its devices, with interpreter and modules of this
    process. Raises ConfigError for devices that are not here."""
    python = python or find_python()
    # The core must find what this process has found, wherever its path was set (a stub's is set by Triton).
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **environment_of(spec.devices, os.environ),
    }
    return Supervisor(
        lambda report_fd, trace_fd, cache: core_command(python, spec, address, report_fd, trace_fd, cache),
        address,
        environment=environment,
        cores=cores_of(spec.devices),
        config=config,
    )


def find_python() -> str:
    """The interpreter of this process. Where it is embedded in another program (Triton's stub), the one beside its
    standard library; raises ConfigError when there is none."""
    names = [f"python{sys.version_info.major}.{sys.version_info.minor}", "python3"]
    candidates = [Path(sys.executable)] if Path(sys.executable or "").name.startswith("python") else []
    candidates += [Path(prefix) / "bin" / name for prefix in (sys.prefix, sys.base_prefix) for name in names]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return str(candidate)
    raise ConfigError(f"no Python {names[0]} found in {sys.prefix} to run the engine core with")


@contextmanager
def start_core(
    spec: CoreSpec,
    text: TextSource,
    observer: Observer | None = None,
    *,
    response_rate: int | None = None,
    ready_timeout_s: float = 600.0,
    drain_timeout_s: float = 0.0,
    supervision: SupervisorConfig | None = None,
) -> Iterator[Front]:
    """A running core and its front; both are gone when the block ends. Raises what keeps the core from starting."""
    address = private_address()
    supervisor = make_supervisor(spec, address, config=supervision)
    supervisor.start()
    try:
        supervisor.wait_ready(ready_timeout_s)
        front = Front(address, text, observer or SilentObserver(), response_rate=response_rate)
        try:
            front.wait_ready(30.0)
            yield front
        finally:
            front.close(drain_timeout_s)
    finally:
        supervisor.close(drain_timeout_s=5.0)


@contextmanager
def start_local(
    engine_dir: Path,
    config: EngineConfig,
    observer: Observer | None = None,
    *,
    watch: Watch | None = None,
    tenants_file: str = "",
    ready_timeout_s: float = 600.0,
    supervision: SupervisorConfig | None = None,
) -> Iterator[Front]:
    """A front for the engine in `engine_dir`, with its tokenizer, in a core of its own."""
    tokenizer = Tokenizer.load(engine_dir / "tokenizer")
    spec = CoreSpec(config=config, engine_dir=str(engine_dir), tenants_file=tenants_file, watch=watch or Watch())
    with start_core(spec, tokenizer, observer, ready_timeout_s=ready_timeout_s, supervision=supervision) as front:
        yield front
