"""File descriptors that a stub has from tritonserver and must not keep.

tritonserver starts a stub by fork and leaves its own sockets open in it. A stub that is started while the server serves
holds the connections of all clients of that moment, which then do not end when the server closes them, and the ports.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_STUB = "triton_python_backend_stub"
_STDERR = 2  # a service manager may have made it a socket


def close_inherited_sockets(proc: Path = Path("/proc/self")) -> None:
    """Close every socket of this process but its standard streams, if it is a stub: one that has just begun has none of
    its own."""
    with contextlib.suppress(OSError):  # a system without these files
        if Path(os.readlink(proc / "exe")).name != _STUB:
            return
        for descriptor in list((proc / "fd").iterdir()):
            with contextlib.suppress(OSError):  # the descriptor of this very listing
                if os.readlink(descriptor).startswith("socket:") and int(descriptor.name) > _STDERR:
                    os.close(int(descriptor.name))
