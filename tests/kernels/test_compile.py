"""All kernels, compiled for several GPUs without one. A process of its own compiles: this one has the interpreter."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import pageflight.kernels
from pageflight.kernels.catalog import TOOLS, all_builds
from pageflight.kernels.compile import (
    CAPABILITIES,
    SHARED_LIMIT_BYTES,
    CompiledKernel,
    markdown_table,
    with_table,
)

ROOT = Path(__file__).parents[2]
COMPILE_ALL = """
import json
from dataclasses import asdict
from pageflight.kernels.catalog import all_builds
from pageflight.kernels.compile import compile_all, compiled
kernels = [asdict(kernel) for kernel in compile_all()]
instructions = {b.name: compiled(b, 90).asm["ptx"] for b in all_builds() if b.name.startswith("rope_and_write")}
print(json.dumps([kernels, instructions]))
"""


def run_without_interpreter(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@dataclass(frozen=True)
class Results:
    kernels: list[CompiledKernel]
    ptx: dict[str, str]


@pytest.fixture(scope="module")
def results() -> Results:
    kernels, ptx = json.loads(run_without_interpreter("-c", COMPILE_ALL).splitlines()[-1])
    return Results([CompiledKernel(**kernel) for kernel in kernels], ptx)


def test_every_build_compiles_for_every_gpu_it_is_for(results: Results) -> None:
    """What the interpreter runs is not all that compiles: FP8 does not exist before sm_89, `while` needs one type."""
    wanted = {(b.name, c) for b in all_builds() for c in CAPABILITIES if c >= b.min_capability}
    assert {(kernel.name, kernel.capability) for kernel in results.kernels} == wanted


def test_every_build_fits_into_shared_memory(results: Results) -> None:
    """Compiling succeeds with any amount; only the launch fails, on the smaller GPU that nobody had tried."""
    assert [kernel for kernel in results.kernels if not kernel.fits] == []


def test_16_bit_builds_keep_their_sums_in_registers(results: Results) -> None:
    """Heads of 128 in tiles of 128 rows and keys took a trip through memory at every key."""
    ours = [
        k
        for k in results.kernels
        if k.name.startswith(("decode_attention_bf16_cache_bf16_d128", "mixed_attention_bf16"))
    ]
    assert ours and [kernel for kernel in ours if kernel.stack_bytes > 0 and "d256" not in kernel.name] == []


def test_fp8_is_rounded_by_the_gpu_and_16_bytes_are_written_at_a_time(results: Results) -> None:
    """The interpreter rounds to e4m3 by itself, and wrongly; narrow stores only showed as time."""
    fp8 = [ptx for name, ptx in results.ptx.items() if "cache_fp8" in name]
    wide = [ptx for name, ptx in results.ptx.items() if "cache_fp8" not in name]
    assert fp8 and all("cvt.rn.satfinite.e4m3x2.f32" in ptx for ptx in fp8)
    assert wide and all(re.search(r"st\.global[.\w]*\.v4", ptx) for ptx in wide)


def test_the_command_writes_a_table_into_a_document(results: Results, tmp_path: Path) -> None:
    """Run while the interpreter is on, it compiled nothing; the document lost what stood around the table."""
    document = tmp_path / "kernels.md"
    document.write_text("before\n<!-- kernels -->\nold\n<!-- /kernels -->\nafter\n")
    command = ("-m", "pageflight.kernels.compile", "--capabilities", "90", "--out", str(document))
    printed = run_without_interpreter(*command)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert all(f"| `{build.name}` |" in text and build.name in printed for build in all_builds())
    assert "sm_90" in text and "sm_80" not in text


def test_a_kernel_that_is_launched_has_a_build() -> None:
    """A kernel that was in no list was first compiled by the first request."""
    built = {build.kernel.fn.__qualname__ for build in all_builds()}
    for module in pkgutil.iter_modules(pageflight.kernels.__path__):
        if module.name in TOOLS:
            continue
        content = vars(importlib.import_module(f"pageflight.kernels.{module.name}"))
        kernels = {value.fn.__qualname__ for value in content.values() if hasattr(value, "arg_names")}
        assert {name for name in kernels if name.endswith("_kernel")} <= built, module.name


def test_builds_have_names_of_their_own() -> None:
    """Two builds of one name were one row of the table."""
    names = [build.name for build in all_builds()]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"\w+", name) for name in names)


def test_builds_name_every_argument() -> None:
    """An argument that was new in the kernel was missing in its build."""
    for build in all_builds():
        assert set(build.kernel.arg_names) == set(build.signature) | set(build.constants), build.name


def test_the_documented_kernels_are_those_that_exist() -> None:
    """python -m pageflight.kernels.compile --out docs/kernels.md writes the table."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    table = text.split("<!-- kernels -->")[1].split("<!-- /kernels -->")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [build.name for build in all_builds()]


def test_a_kernel_that_does_not_fit_is_marked_in_the_table() -> None:
    """A number alone does not say that it is too much."""
    values = {"name": "x", "registers": 40, "stack_bytes": 8, "num_warps": 4, "cubin_bytes": 1, "seconds": 0.1}
    kernels = [CompiledKernel(capability=c, shared_bytes=100 << 10, **values) for c in (89, 90)]
    assert markdown_table(kernels).splitlines()[-1] == "| `x` | 4 | 40 + 8 B, 100 KiB (too large) | 40 + 8 B, 100 KiB |"
    assert set(CAPABILITIES) <= set(SHARED_LIMIT_BYTES)
    with pytest.raises(AssertionError):
        with_table("no markers", "table")
