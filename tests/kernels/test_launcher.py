"""What is said where the Triton language cannot launch kernels."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from pageflight.core.errors import ConfigError
from pageflight.kernels.launcher import check_launcher


class _Driver:
    """Makes its module when it is first asked for something, as Triton's own does."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    @property
    def active(self) -> Any:
        if self._error is not None:
            raise self._error
        return SimpleNamespace(get_current_target=lambda: "cuda:90")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc"]),
        AssertionError("libcuda.so cannot found!"),
        PermissionError(13, "Permission denied", ".triton"),
    ],
)
def test_a_host_without_a_compiler_is_told_what_to_install(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core died at its first step with the compiler's exit status, and was started again and again."""
    monkeypatch.setattr(triton.runtime, "driver", _Driver(error))
    with pytest.raises(ConfigError, match="apt install gcc libc6-dev python3-dev"):
        check_launcher()


def test_a_host_that_can_launch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that always speaks would keep everybody out."""
    monkeypatch.setattr(triton.runtime, "driver", _Driver(None))
    check_launcher()
