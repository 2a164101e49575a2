"""Imports run one way, and heavy libraries stay at the leaves. Read from the syntax trees: nothing is executed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"pageflight": ROOT / "engine_src" / "pageflight", "pageflight_build": ROOT / "build" / "pageflight_build"}

# A package may import those of lower layers; within a layer only what `SIDEWAYS` names.
LAYERS = (
    {"core"},
    {"models", "quant", "kernels"},
    {"kv", "lowering", "sampling"},
    {"ranks"},
    {"sched", "runners", "text", "obs"},
    {"loop"},
    {"backend"},
    {"cli"},
)
SIDEWAYS = {("quant", "models"), ("loop", "loop")}
BUILD_MAY_IMPORT = {"core", "models", "lowering", "quant"}
ONLY_IMPORTED_BY = {"kv": {"sched", "runners", "loop", "backend", "cli"}}
"""Blocks are the business of few: nobody else may learn of them by accident."""

LEAVES = {
    "openvino": {"lowering"},
    "torch": {"lowering", "kernels", "ranks", "runners", "quant"},
    "triton": {"kernels", "lowering", "runners"},
    "tensorrt": {"lowering"},
    "tensorrt_rtx": {"lowering"},
    "transformers": set(),
    "triton_python_backend_utils": {"backend"},
    "tritonclient": {"cli", "pageflight_build"},
    "tokenizers": {"text", "pageflight_build"},
    "jinja2": {"text"},
    "typer": {"cli"},
    "rich": {"cli", "pageflight_build"},
    "zmq": {"loop"},
    "huggingface_hub": {"pageflight_build"},
    "ray": {"ranks"},
}


IN_PROCESS = {
    "attention_checks.py",
    "cache_pressure.py",
    "card.py",
    "decode_steps.py",
    "drive.py",
    "engine_alone.py",
    "engine_checks.py",
    "engine_steps.py",
    "host_cost.py",
    "host_counts.py",
    "inter_token.py",
    "kernel_checks.py",
    "models.py",
    "network_walk.py",
    "parallel_checks.py",
    "parallel_rank.py",
    "prefix_cache.py",
    "responses.py",
    "sampling_checks.py",
    "state_checks.py",
    "survival.py",
    "tensorrt_builds.py",
    "tensorrt_checks.py",
    "tensorrt_flavors.py",
    "tensorrt_models.py",
    "tensorrt_networks.py",
    "tensorrt_ranks.py",
    "tensorrt_segments.py",
    "tuning_checks.py",
    "virtual_engine.py",
}
"""Benchmarks of a part alone, or with a part that costs nothing; everything else in perf/ is a client."""


@dataclass(frozen=True)
class Import:
    """`module` imported in `path` at `line`; `typing_only` when it stands under `if TYPE_CHECKING:`."""

    path: Path
    line: int
    module: str
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def imports_in(source: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(source, str(path))
    guarded = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, id(node) in guarded)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            assert node.module is not None
            yield Import(path, node.lineno, node.module, id(node) in guarded)
            for alias in node.names:  # `from pageflight import core` names a package too
                yield Import(path, node.lineno, f"{node.module}.{alias.name}", id(node) in guarded)


def package_of(module: str) -> str | None:
    """`core`, `loop` … or `pageflight_build`; None for other software and for `pageflight` itself."""
    parts = module.split(".")
    if parts[0] == "pageflight_build":
        return "pageflight_build"
    known = set().union(*LAYERS)
    return parts[1] if parts[0] == "pageflight" and len(parts) > 1 and parts[1] in known else None


def layer_of(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


def broken_rule(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`; None when it may."""
    if importer == imported:
        return None
    if imported == "pageflight_build":
        return None if importer == "cli" else "the runtime never imports the build: they share the manifest only"
    if importer == "pageflight_build":
        return None if imported in BUILD_MAY_IMPORT else f"the build may import {sorted(BUILD_MAY_IMPORT)} only"
    if (importer, imported) in SIDEWAYS:
        return None
    if layer_of(imported) >= layer_of(importer):
        return f"{importer} is not above {imported}"
    if importer not in ONLY_IMPORTED_BY.get(imported, {importer}):
        return f"{imported} is for {sorted(ONLY_IMPORTED_BY[imported])} only"
    return None


def all_imports() -> list[tuple[str, Import]]:
    found = []
    for name, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            importer = name if name == "pageflight_build" else (relative.parts[0] if len(relative.parts) > 1 else name)
            shown = path.relative_to(ROOT)
            found += [(importer, item) for item in imports_in(path.read_text(encoding="utf-8"), shown)]
    return found


def test_every_package_has_a_layer() -> None:
    """A new package without a place in the order would escape the rule in silence."""
    packages = {path.parent.name for path in SOURCES["pageflight"].glob("*/__init__.py")}
    assert packages <= set().union(*LAYERS)


def test_imports_run_one_way() -> None:
    """One import upwards, and the scheduler could no longer be tested without a server."""
    broken = []
    for importer, item in all_imports():
        imported = package_of(item.module)
        if importer == "pageflight" or imported is None:
            continue
        reason = broken_rule(importer, imported)
        if reason:
            broken.append(f"{item}: {reason}")
    assert not broken, "\n".join(dict.fromkeys(broken))


def test_core_imports_the_standard_library_only() -> None:
    """Its types cross every border, so whatever they need, everybody needs. Names for type checkers may be imported."""
    foreign = [
        str(item)
        for importer, item in all_imports()
        if importer == "core" and not item.typing_only and package_of(item.module) != "core"
        if item.module.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not foreign, "\n".join(foreign)


def test_heavy_libraries_stay_at_the_leaves() -> None:
    """`import pageflight.sched` once pulled in a gigabyte of torch through a helper module."""
    misplaced = [
        f"{item}: {library} is for {sorted(LEAVES[library]) or 'tests'} only"
        for importer, item in all_imports()
        if (library := item.module.split(".")[0]) in LEAVES and importer not in LEAVES[library]
    ]
    assert not misplaced, "\n".join(dict.fromkeys(misplaced))


def test_perf_speaks_only_the_wire() -> None:
    """A benchmark that reaches into the engine measures something no client can have."""
    reaching = [
        str(item)
        for path in sorted((ROOT / "perf").rglob("*.py"))
        if path.name not in IN_PROCESS
        for item in imports_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT))
        if item.module.split(".")[0] in SOURCES
    ]
    assert not reaching, "\n".join(dict.fromkeys(reaching))


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("sched", "from pageflight.loop.front import Front"),
        ("core", "import pageflight.models.config"),
        ("text", "from pageflight import kv"),
        ("loop", "import pageflight_build.recipe"),
        ("pageflight_build", "def late():\n    from pageflight.text.tokenizer import Tokenizer"),
    ],
)
def test_the_rule_notices_a_wrong_import(importer: str, source: str) -> None:
    """A check that cannot fail is none."""
    imported = [package_of(item.module) for item in imports_in(source, Path("made_up.py"))]
    assert any(broken_rule(importer, package) for package in imported if package)
