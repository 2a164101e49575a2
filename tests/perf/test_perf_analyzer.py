import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "perf_analyzer"


def installed(folder: Path) -> Path:
    """A cache in which something is installed under the script's version."""
    [line] = [line for line in SCRIPT.read_text().splitlines() if line.startswith("version=")]
    return folder / f"perf_analyzer-{line.split()[0].removeprefix('version=')}"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(cache: Path, *arguments: str) -> str:
    environment = {**os.environ, "PAGEFLIGHT_CACHE": str(cache)}
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_arguments_reach_an_installed_binary_unchanged(tmp_path: Path) -> None:
    """Spaces and empty strings were lost on the way, and the cache was filled again at every start."""
    executable(installed(tmp_path) / "bin" / "perf_analyzer", 'for a; do echo "[$a]"; done')
    assert run(tmp_path, "-m", "two words", "") == "[-m]\n[two words]\n[]\n"


def test_the_loader_beside_the_binary_is_used_where_there_is_one(tmp_path: Path) -> None:
    """Only that loader knows the newer C library; the binary alone ends with `GLIBC_2.38 not found`."""
    home = installed(tmp_path)
    executable(home / "bin" / "perf_analyzer", "exit 9")
    executable(home / "lib" / "ld-linux-x86-64.so.2", 'for a; do echo "[$a]"; done')
    binary = home / "bin" / "perf_analyzer"
    expected = ["--library-path", str(home / "lib"), "--argv0", str(binary), str(binary), "--version"]
    assert run(tmp_path, "--version").splitlines() == [f"[{word}]" for word in expected]


@pytest.mark.parametrize("path", sorted((ROOT / "perf" / "inputs").glob("*.json")), ids=lambda path: path.name)
def test_example_inputs_have_the_form_that_perf_analyzer_reads(path: Path) -> None:
    """`data` holds steps; a tensor is a list, or content with a shape."""
    steps = json.loads(path.read_text())["data"]
    assert steps
    for step in steps:
        for name, value in step.items():
            content, shape = (value["content"], value["shape"]) if isinstance(value, dict) else (value, None)
            assert isinstance(content, list), name
            if shape is not None:
                size = 1
                for length in shape:
                    size *= length
                assert size == len(content), name
