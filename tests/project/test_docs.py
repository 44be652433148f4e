"""Every command and every line of Python in docs/ is run; links lead somewhere; the commands of the
README are understood.

A page's blocks run in its order: `bash` ones as commands, `python` ones in one namespace. One that
begins with `# bench/...` is a file, or a line of a registry, in a copy of the sources. One that
begins with `# needs PACKAGE` is run by itself, where that package is installed.
"""

import os
import re
import shlex
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from conftest import ROOT, insert_after
from resfuse.bench.cli import parser

pytestmark = pytest.mark.slow

PAGES = sorted((ROOT / "docs").glob("*.md"))
# These say where things are; a page of instructions may name a file that its reader is to write.
MAPS = (
    ROOT / "ARCHITECTURE.md",
    ROOT / "bench/README.md",
    ROOT / "kernels/README.md",
    *sorted((ROOT / "docs/design").glob("*.md")),
)
_FILE = re.compile(r"(?<![\w.*])[a-z]\w*(?:/\w+)*\.(?:py|h|cpp|css)\b")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"# needs ([\w-]+)\n")
_PLACE = re.compile(r"# (bench/[\w/]+\.py)(?:, in (\w+))?\n")
_LINK = re.compile(r"\]\(([^)#:]+)\)")


def blocks(page: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(page.read_text())


def in_bash(
    script: str, home: Path, sources: Path, python: str
) -> subprocess.CompletedProcess[str]:
    """With `python` and `resfuse` on the path, as in an activated environment; the command is that
    of `sources`, run by `python`."""
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    for name, options in (("python", ""), ("resfuse", "-m resfuse.bench")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{python}" {options} "$@"\n')
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(sources),
    }
    return subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def plant(block: str, sources: Path) -> bool:
    """Writes a block into the sources, if that is what it is for."""
    place = _PLACE.match(block)
    if place is None:
        return False
    path, registry = sources / "resfuse" / place[1], place[2]
    rest = block[place.end() :]
    if registry is None:
        path.write_text(rest)
    else:
        insert_after(path, registry, rest.rstrip("\n"))
    return True


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch finds the backends of pyproject.toml, as if this checkout were the one installed."""
    from torch._dynamo.backends import registry

    group = "torch_dynamo_backends"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, value in project["entry-points"][group].items():
        monkeypatch.setitem(registry._BACKENDS, name, metadata.EntryPoint(name, value, group))


@pytest.mark.usefixtures("entry_points")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(
    page: Path,
    tmp_path: Path,
    checkout: Path,
    forked_python: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    ran = 0
    for language, block in blocks(page):
        if _NEEDS.match(block):
            continue
        if language == "bash":
            done = in_bash(block, tmp_path, checkout, forked_python)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        elif language == "python" and not plant(block, checkout):
            exec(compile(block, str(page), "exec"), names)
        ran += bool(language)
    assert ran, f"{page.name} shows nothing to run"


OF_PACKAGES = [
    pytest.param(needs[1], language, block, id=f"{page.stem}-{needs[1]}")
    for page in PAGES
    for language, block in blocks(page)
    if language in ("bash", "python") and (needs := _NEEDS.match(block))
]


@pytest.mark.parametrize(("package", "language", "block"), OF_PACKAGES)
def test_what_needs_a_package_runs(
    package: str, language: str, block: str, tmp_path: Path, checkout: Path, forked_python: str
) -> None:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (make real-weights)")
    if language == "python":
        (tmp_path / "block.py").write_text(block)
        block = "python block.py"
    done = in_bash(block, tmp_path, checkout, forked_python)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    said = done.stdout + done.stderr
    assert "fail_accuracy" not in said, said  # a row that failed ends no sweep


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_commands_of_the_readme_are_understood() -> None:
    lines = [line for _, block in blocks(ROOT / "README.md") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("resfuse ")]
    assert len(commands) >= 4
    for command in commands:
        parser().parse_args(command[1:])


def test_there_are_six_pages_at_most() -> None:
    assert 1 <= len(PAGES) <= 6


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """By their names; a path from the repository's root in full."""
    folders = [ROOT / name for name in ("bench", "kernels", "resnet_ref", "tools", "tests")]
    there = {path.name for folder in folders for path in folder.rglob("*.*")}
    for name in _FILE.findall(page.read_text().replace("\\_", "_")):
        assert name.split("/")[-1] in there, f"{page.name}: {name}"
        if name.split("/")[0] in [folder.name for folder in folders]:
            assert (ROOT / name).exists(), f"{page.name}: {name}"
