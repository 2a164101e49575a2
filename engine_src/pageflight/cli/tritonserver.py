"""Finds NVIDIA's tritonserver and says how to start it: arguments and environment.

The server is the one that $TRITONSERVER names, else `tritonserver` on PATH, else the container's place, else the one in
the `nvidia-pytriton` wheel beside this package. The wheel keeps its Python stubs apart from the Python backend, one per
Python version; they are put together in a cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pageflight.cli.stub import adapt_stub
from pageflight.core.errors import ConfigError

_STUB = "triton_python_backend_stub"
_CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
_CACHE_VERSION = "1"
_CACHE_KEPT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How to start the server. `environment` is complete; `added_environment` is what differs from this process's."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    added_environment: Mapping[str, str]

    def with_environment(self, more: Mapping[str, str]) -> ServerCommand:
        return replace(
            self,
            environment={**self.environment, **more},
            added_environment={**self.added_environment, **more},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """A tritonserver. `stubs` is set where the Python backend's stub must be put in its place first."""

    program: Path
    backends: Path | None = None
    stubs: Path | None = None
    libraries: Path | None = None


def find_server() -> Installation:
    """The tritonserver to use. Raises ConfigError when there is none, with what to do."""
    named = os.environ.get("TRITONSERVER", "")
    if named:
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise ConfigError(f"TRITONSERVER={named!r}: is not a program")
        return _installation(Path(named).resolve())
    on_path = shutil.which("tritonserver")
    wheel = _site_packages() / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    for candidate in (Path(on_path) if on_path else None, _CONTAINER, wheel):
        if candidate is not None and os.access(candidate, os.X_OK):
            return _installation(candidate.resolve())
    raise ConfigError(
        "no tritonserver: set TRITONSERVER to the program, put it on PATH,"
        " or install NVIDIA's: pip install --no-deps nvidia-pytriton==0.7.0"
    )


def server_command(
    repository: Path,
    *,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    host: str = "0.0.0.0",
    exit_timeout_s: float = 30.0,
    further: Sequence[str] = (),
) -> ServerCommand:
    """The command that serves `repository`; prepares the backends' copy where one is needed.

    Raises ConfigError when there is no server, or none that runs models with this Python.
    """
    server = find_server()
    arguments = [
        str(server.program),
        f"--model-repository={repository.resolve()}",
        f"--http-address={host}",
        f"--http-port={http_port}",
        f"--grpc-address={host}",
        f"--grpc-port={grpc_port}",
        f"--metrics-address={host}",
        f"--metrics-port={metrics_port}",
        f"--exit-timeout-secs={max(1, round(exit_timeout_s))}",
        # Configurations are complete; completing them would start every model's process twice.
        "--disable-auto-complete-config",
    ]
    if server.backends is not None and server.stubs is not None:
        arguments.append(f"--backend-directory={prepare_backends(server.backends, server.stubs)}")
    if not Path("/dev/nvidiactl").exists():
        arguments.append("--allow-gpu-metrics=false")
    arguments += further
    added = _environment(server)
    return ServerCommand(arguments=tuple(arguments), environment={**os.environ, **added}, added_environment=added)


def prepare_backends(backends: Path, stubs: Path) -> Path:
    """A copy of `backends` whose Python backend has the stub of this Python version; made once, then found again."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = stubs / python / _STUB
    if not stub.is_file():
        known = ", ".join(sorted(path.name for path in stubs.iterdir() if path.is_dir()))
        raise ConfigError(f"this tritonserver runs models with Python {known}; this is Python {python}")
    program = adapt_stub(stub.read_bytes())
    facts = (_CACHE_VERSION, str(backends), str(backends.stat().st_mtime_ns), hashlib.sha256(program).hexdigest())
    key = hashlib.sha256("\0".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    root = _cache() / "backends"
    target = root / key
    if target.is_dir():
        os.utime(target)
        return target
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    try:
        shutil.copytree(backends, building, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        copy = building / "python" / _STUB
        copy.write_bytes(program)
        copy.chmod(0o755)
        building.chmod(0o755)
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process has just made the same
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _forget_old(root)
    return target


def _installation(program: Path) -> Installation:
    """What lies beside the program: the wheel's layout, or a server that is complete as it is."""
    root = program.parent.parent
    backends, stubs = root / "backends", root / "python_backend_stubs"
    if not (backends / "python").is_dir() or not stubs.is_dir():
        return Installation(program=program)
    libraries = root.parent.parent / "nvidia_pytriton.libs"
    return Installation(
        program=program, backends=backends, stubs=stubs, libraries=libraries if libraries.is_dir() else None
    )


def _environment(server: Installation) -> dict[str, str]:
    """Libraries of the server and of this Python for the stubs; this Python first on PATH, by which a stub finds it."""
    libraries = [str(server.libraries)] if server.libraries is not None else []
    libraries += [sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    added = {
        "LD_LIBRARY_PATH": os.pathsep.join(dict.fromkeys(folder for folder in libraries if folder)),
        "PATH": os.pathsep.join([scripts, *(folder for folder in path if folder != scripts)]),
    }
    return {name: value for name, value in added.items() if os.environ.get(name) != value}


def _site_packages() -> Path:
    return Path(sysconfig.get_path("platlib"))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pageflight"


def _forget_old(root: Path) -> None:
    """Keep the copies used last: each Python version and release of the server leaves one."""
    copies = sorted((path for path in root.iterdir() if not path.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    for path in copies[:-_CACHE_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
