from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pageflight.cli import tritonserver
from pageflight.cli.stub import adapt_stub
from pageflight.cli.tritonserver import find_server, prepare_backends, server_command
from pageflight.core.errors import ConfigError

BYTE_SIZE = bytes.fromhex("48634020480fafc248894368")
STRIDES = bytes.fromhex("488b068b4020894580")
STUB = b"start" + BYTE_SIZE * 2 + b"middle" + BYTE_SIZE * 2 + STRIDES + b"end"


def test_item_size_is_read_where_numpy_2_keeps_it() -> None:
    """With NumPy 2 every input of several bytes arrived as copies of its first byte, and strings killed the stub."""
    adapted = adapt_stub(STUB, "2.3.5")
    changed = [index for index, (a, b) in enumerate(zip(STUB, adapted, strict=True)) if a != b]
    assert len(changed) == 5
    assert all((STUB[index], adapted[index]) == (0x20, 0x28) for index in changed)


def test_numpy_1_and_newer_stubs_need_no_change() -> None:
    assert adapt_stub(STUB, "1.26.4") == STUB
    assert adapt_stub(b"another build", "2.3.5") == b"another build"


def test_unknown_build_of_the_stub_is_refused() -> None:
    with pytest.raises(ConfigError, match="NumPy 2"):
        adapt_stub(STUB + BYTE_SIZE, "2.3.5")


def test_stub_of_this_python_lies_beside_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backends, stub = tmp_path / "backends", tmp_path / "stubs" / version / "triton_python_backend_stub"
    (backends / "python").mkdir(parents=True)
    (backends / "python" / "libtriton_python.so").write_bytes(b"library")
    stub.parent.mkdir(parents=True)
    stub.write_bytes(STUB)
    copy = prepare_backends(backends, tmp_path / "stubs")
    made = copy / "python" / "triton_python_backend_stub"
    assert os.access(made, os.X_OK)
    assert (copy / "python" / "libtriton_python.so").read_bytes() == b"library"
    assert prepare_backends(backends, tmp_path / "stubs") == copy
    stub.write_bytes(STUB + b"another release")
    assert prepare_backends(backends, tmp_path / "stubs") != copy
    assert not list(copy.parent.glob(".building-*"))


def test_server_without_a_stub_for_this_python_says_which_it_has(tmp_path: Path) -> None:
    (tmp_path / "backends" / "python").mkdir(parents=True)
    (tmp_path / "stubs" / "2.7").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"2\.7"):
        prepare_backends(tmp_path / "backends", tmp_path / "stubs")


def test_named_server_must_be_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER", str(tmp_path))
    with pytest.raises(ConfigError, match="TRITONSERVER"):
        find_server()


def test_named_server_wins_and_is_complete_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("TRITONSERVER", str(program))
    command = server_command(tmp_path, http_port=1, grpc_port=2, metrics_port=3, further=["--log-verbose=1"])
    assert command.arguments[0] == str(program)
    assert f"--model-repository={tmp_path}" in command.arguments
    assert command.arguments[-1] == "--log-verbose=1"
    assert not any(argument.startswith("--backend-directory") for argument in command.arguments)


def test_no_server_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITONSERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tritonserver, "_CONTAINER", tmp_path / "nothing")
    monkeypatch.setattr(tritonserver, "_site_packages", lambda: tmp_path)
    with pytest.raises(ConfigError, match="pip install"):
        find_server()
