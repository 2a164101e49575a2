"""Compiles the builds of all kernels for several GPUs, without one, and says what each takes of a multiprocessor.

    python -m pageflight.kernels.compile [--capabilities 80 89 90 100] [--out FILE]

FILE: a Markdown document whose block between `<!-- kernels -->` and `<!-- /kernels -->` is written anew.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.catalog import all_builds

CAPABILITIES = (80, 89, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that a block of threads can have (CUDA C++ Programming Guide, technical specifications)."""

ALIGNED = ("stride_", "num_inputs", "num_outputs", "num_features")
"""Beginnings of integer arguments that are multiples of 16 with real models, as addresses are: a launch looks at them
and then moves 16 bytes at a time; a build has nothing to look at and is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """What one build takes on one GPU."""

    name: str
    capability: int
    registers: int  # per thread
    stack_bytes: int  # per thread: what did not fit into registers
    shared_bytes: int  # per program
    num_warps: int
    cubin_bytes: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= SHARED_LIMIT_BYTES[self.capability]


def compiled(build: KernelBuild, capability: int) -> Any:
    """Triton's compiled kernel, with `asm["ptx"]` and `asm["cubin"]`; from its cache if it is there.

    Raises what Triton raises.
    """
    parameters, names = build.kernel.params, build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else build.signature[name] for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if not parameters[index].do_not_specialize_on_alignment
        and (signature[name].startswith("*") or (signature[name] in ("i32", "i64") and name.startswith(ALIGNED)))
    }
    return triton.compile(
        ASTSource(build.kernel, signature, dict(build.constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )


def compile_build(build: KernelBuild, capability: int) -> CompiledKernel:
    """Compile to machine code and read what it takes."""
    began_s = time.perf_counter()
    kernel = compiled(build, capability)
    cubin: bytes = kernel.asm["cubin"]
    registers, stack_bytes = resource_usage(cubin)
    return CompiledKernel(
        name=build.name,
        capability=capability,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        cubin_bytes=len(cubin),
        seconds=time.perf_counter() - began_s,
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, read from machine code by the `cuobjdump` that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def compile_all(
    capabilities: Iterable[int] = CAPABILITIES, builds: Iterable[KernelBuild] | None = None
) -> list[CompiledKernel]:
    """Every build (those of the catalog unless given) on every GPU that it is for, ordered by build."""
    chosen, targets = all_builds() if builds is None else tuple(builds), tuple(capabilities)
    return [
        compile_build(build, capability)
        for build in chosen
        for capability in targets
        if capability >= build.min_capability
    ]


def markdown_table(kernels: Iterable[CompiledKernel]) -> str:
    """One row per build; per GPU registers, stack and KiB of shared memory."""
    rows: dict[str, dict[int, CompiledKernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.capability] = kernel
    capabilities = sorted({capability for row in rows.values() for capability in row})
    lines = [
        "| build | warps | " + " | ".join(f"sm_{capability}" for capability in capabilities) + " |",
        "|---" * (2 + len(capabilities)) + "|",
    ]
    for name, row in rows.items():
        warps = next(iter(row.values())).num_warps
        cells = [_cell(row[capability]) if capability in row else "–" for capability in capabilities]
        lines.append(f"| `{name}` | {warps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(kernel: CompiledKernel) -> str:
    stack = f" + {kernel.stack_bytes} B" if kernel.stack_bytes else ""
    too_large = "" if kernel.fits else " (too large)"
    return f"{kernel.registers}{stack}, {kernel.shared_bytes / 1024:.0f} KiB{too_large}"


def with_table(text: str, table: str) -> str:
    """The document `text` with its generated block written anew."""
    parts = re.split(r"(<!-- /?kernels -->)", text)
    assert parts[1::2] == ["<!-- kernels -->", "<!-- /kernels -->"], "one block <!-- kernels --> … <!-- /kernels -->"
    return "".join([*parts[:2], f"\n{table}\n", *parts[3:]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pageflight.kernels.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES, choices=SHARED_LIMIT_BYTES)
    parser.add_argument("--out", type=Path, help="Markdown document whose generated block is written anew")
    options = parser.parse_args()
    kernels = compile_all(options.capabilities)
    table = markdown_table(kernels)
    print(table)
    print(f"\n{len(kernels)} kernels in {sum(kernel.seconds for kernel in kernels):.1f} s")
    if options.out:
        options.out.write_text(with_table(options.out.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
