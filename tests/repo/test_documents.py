"""What the documents say is true of the code: versions, commands, files, options, errors, pins."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pageflight
from pageflight.cli import reference
from pageflight.cli.main import app
from pageflight.core.errors import STATUS, PageflightError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file()]


def code_blocks(path: Path, language: str) -> list[str]:
    """Contents of the fenced blocks that open with ```language."""
    parts = re.split(r"^```(\w*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fences = list(zip(parts[1::2], parts[2::2], strict=True))  # openings and closings take turns
    return [content for opening, content in fences[::2] if opening == language]


def shell_commands(path: Path) -> list[list[str]]:
    text = "\n".join(code_blocks(path, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s#.*", "", line).strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def test_the_version_is_the_newest_of_the_changelog() -> None:
    """A release went out whose changelog ended one version earlier."""
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == pageflight.__version__


def test_the_readme_tree_is_the_tree() -> None:
    """Folders moved, the README's tree did not."""
    tree = next(block for block in code_blocks(ROOT / "README.md", "") if "engine_src" in block)
    named = {line.split()[0].strip("/").split("/")[0] for line in tree.splitlines() if line.strip()}
    missing = [line.split()[0] for line in tree.splitlines() if line.strip() and not (ROOT / line.split()[0]).exists()]
    assert missing == []
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    folders = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert folders <= named | {"model_repository"}
    packages = next(line for line in tree.splitlines() if line.startswith("engine_src")).split(": ")[1].split(", ")
    assert set(packages) == {path.parent.name for path in (ROOT / "engine_src" / "pageflight").glob("*/__init__.py")}
    scripts = next(line for line in tree.splitlines() if line.startswith("scripts")).split(None, 1)[1].split(", ")
    assert all((ROOT / "scripts" / name).is_file() for name in scripts)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(path: Path) -> None:
    """The first command of a README is the worst place for a typing error."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in shell_commands(path):
        program = words[0].removeprefix("./")
        if program.startswith(("scripts/", ".ci/")):
            assert (ROOT / program).is_file(), words
            given, command = words[1:], commands["up"] if program == "scripts/serve" else None
        elif program.endswith("pageflight"):
            given, command = words[2:], commands[words[1]]
        else:
            assert program in ("curl", "docker", "kind", "kubectl", "nvidia-smi", "sudo"), words
            continue
        if command is not None:
            known = {name for item in command.params for name in [*item.opts, *item.secondary_opts]} | {"--help"}
            assert {word for word in given if word.startswith("--")} <= known, words


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Half the links of a README pointed at files of an older layout."""
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_compiles(path: Path) -> None:
    """An example with a missing bracket teaches nothing."""
    for block in code_blocks(path, "python"):
        compile(block, str(path), "exec")


def test_the_picture_is_well_formed() -> None:
    """One wrong character, and browsers show nothing at all."""
    root = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    assert root.tag.endswith("svg") and len(list(root.iter())) > 30


def test_the_command_reference_is_up_to_date() -> None:
    """The documented options were those of a year ago. scripts/docs writes the file."""
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference.cli_reference()


def test_the_tables_of_options_are_up_to_date() -> None:
    """An option that nobody can look up is used by nobody. scripts/docs writes the tables."""
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    assert reference.with_tables(text) == text
    assert "| `temperature` |" in text and "| `text_output` |" in text


def test_the_error_table_is_complete() -> None:
    """A new error was documented nowhere, with a status that nobody had decided."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) \|", (ROOT / "docs/errors.md").read_text("utf-8"), re.MULTILINE)
    expected = {cls.__name__: (s.triton, str(s.http)) for cls, s in STATUS.items() if cls is not PageflightError}
    assert {name: (triton, http) for name, triton, http in rows} == expected


def test_documented_parameters_are_those_of_the_engine() -> None:
    """The documentation explained a parameter that had been renamed."""
    from pageflight_build.triton_config import Deployment, model_configs

    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = text.split("## In the repository")[1].split("## Files")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert documented == set(model_configs(Deployment(name="x"))["engine"].parameters)


def test_every_dependency_has_one_exact_version() -> None:
    """An unpinned dependency of a dependency broke the first start, months after the release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    lines = (ROOT / "scripts" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {canonicalize_name(pin.name): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}
    for requirement in direct:
        if requirement.marker is None or requirement.marker.evaluate():
            assert str(here[canonicalize_name(requirement.name)].specifier) == str(requirement.specifier)
    for python in ("3.10", "3.11", "3.12", "3.13"):
        names = [
            canonicalize_name(p.name) for p in pins if not p.marker or p.marker.evaluate({"python_version": python})
        ]
        assert len(names) == len(set(names)), python


def test_what_is_installed_for_running_is_what_is_pinned() -> None:
    """The lock file listed versions that no machine had ever installed."""
    lock = (ROOT / "scripts" / "requirements.lock").read_text(encoding="utf-8").split("# dev")[0]
    pins = [Requirement(line) for line in lock.splitlines() if line and not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    differing = [
        f"{pin}: {metadata.version(pin.name)}" for pin in here if metadata.version(pin.name) not in pin.specifier
    ]
    assert differing == []


def test_running_needs_neither_torch_nor_cuda() -> None:
    """A machine without a GPU downloaded four gigabytes to serve on its CPU."""
    lock = (ROOT / "scripts" / "requirements.lock").read_text(encoding="utf-8").split("# dev")[0]
    assert not re.search(r"^(torch|transformers|triton|nvidia|cuda|tensorrt)[-=]", lock, re.MULTILINE)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    """A script that is only run on a fresh machine is only found broken on a fresh machine."""
    if path.read_text(encoding="utf-8", errors="replace").startswith("#!/usr/bin/env bash") or path.suffix == ".sh":
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("folder", ["engine_src", "build", "scripts", "docs", "tests", "perf"])
def test_the_repository_names_no_machine(folder: str) -> None:
    """Paths of one developer's machine were in an example, and then in everybody's."""
    forbidden = re.compile("|".join(["/" + "work/", "/" + "home/[a-z]+/(?!pageflight)", "/" + "root/"]))
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file()
        and path.suffix in (".py", ".md", ".sh", ".toml", ".svg", ".json", "")
        and "__pycache__" not in str(path)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if path.stat().st_size < 1 << 20 and forbidden.search(line)
    ]
    assert found == []
