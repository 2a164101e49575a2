"""Whether kernels can be launched here at all: the Triton language compiles a small C module for that, once."""

from __future__ import annotations

import subprocess

import triton

from pageflight.core.errors import ConfigError


def check_launcher() -> None:
    """Make that module, or find it in the cache ($TRITON_CACHE_DIR, else ~/.triton).

    Raises ConfigError, before any weight is loaded, where it cannot be made: a first launch would fail in the same way
    with the compiler's own words, or none.
    """
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            "kernels of the Triton language cannot be launched: that takes a C compiler and Python's headers"
            " (apt install gcc libc6-dev python3-dev), the driver's libcuda.so.1, and a folder that can be written to"
            f" (TRITON_CACHE_DIR): {error}"
        ) from None
