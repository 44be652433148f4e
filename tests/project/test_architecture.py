"""The folders are the architecture: imports go down from layer to layer, and never in a circle.

`python tests/project/test_architecture.py` draws the graph of the folders.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("bench", "kernels", "resnet_ref", "tools")
MOST_ENTRIES = 20
# From the bottom to the top. A folder may import from the layers below its own; folders of one
# layer do not know each other.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (("kernels", "resnet_ref"), ("bench",), ("tools",)),
    "kernels": (
        ("ops", "observation", "onnx_reader"),
        ("cpu",),
        ("tuning_cache",),
        ("gpu",),
        ("fusion", "engine"),
    ),
    "kernels/engine": (
        ("ir",),
        ("frontend", "memory"),
        ("tactics",),
        ("planning", "runtime", "cost"),
        ("tuning", "saving", "quantization"),
        ("shapes",),
        ("torch_compile",),
    ),
    "kernels/fusion": (("tracing",), ("matching",), ("layers",), ("planning",), ("training",)),
    "bench": (
        ("common",),
        ("models",),
        ("records",),
        ("backends",),
        ("measuring", "trainings"),
        ("report",),
        ("running",),
        ("layers", "engine", "compare", "doctor"),
        ("cluster", "distributed", "studies"),
        ("cli",),
    ),
    "bench/report": (("data",), ("tables",), ("sections",), ("plots",), ("html",)),
    "bench/measuring": (("clock",), ("probes",)),
}

Arrows = dict[str, dict[str, list[str]]]  # importing folder -> imported folder -> where


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by the name it is imported by."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(("resfuse", *parts))] = path
    return found


def imported(tree: ast.Module, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else node.module


@cache
def file_arrows() -> dict[str, set[str]]:
    known = modules()
    return {
        name: {other for other in imported(ast.parse(path.read_text()), known) if other != name}
        for name, path in known.items()
    }


@cache
def folder_arrows(depth: int) -> Arrows:
    """Between folders, a folder standing for all below it from `depth` parts on."""
    known = modules()

    def folder(name: str) -> str:
        return "/".join(known[name].relative_to(ROOT).parent.parts[:depth])

    arrows: Arrows = defaultdict(lambda: defaultdict(list))
    for name, others in file_arrows().items():
        for other in others:
            if folder(name) != folder(other):
                arrows[folder(name)][folder(other)].append(f"{name} -> {other}")
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle among the arrows, its first name again at its end; nothing where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def floors(arrows: dict[str, set[str]]) -> int:
    """Names on the longest way down, where there is no circle."""
    height: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in height:
            height[name] = 1 + max(map(of, arrows.get(name, ())), default=0)
        return height[name]

    return max(map(of, arrows), default=0)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_module_imports_itself_over_others() -> None:
    assert not circle(file_arrows())


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_folders_import_in_no_circle(depth: int) -> None:
    arrows = folder_arrows(depth)
    found = circle({name: set(others) for name, others in arrows.items()})
    steps = [arrows[a][b][0] for a, b in pairwise(found)]
    assert not found, f"{' -> '.join(found)}: {steps}"


@pytest.mark.parametrize("place", LAYERS)
def test_no_arrow_goes_up(place: str) -> None:
    """Every folder has a layer, and imports from lower ones alone."""
    layer = {name: at for at, names in enumerate(LAYERS[place]) for name in names}
    here = PurePosixPath(place)
    depth = len(here.parts) + 1
    inside = {
        path.relative_to(ROOT / place).parts[0]
        for path in modules().values()
        if path.is_relative_to(ROOT / place) and len(path.relative_to(ROOT / place).parts) > 1
    }
    assert inside <= set(layer) | ({"docs", "results", "tests"} if not place else set())
    for name, others in folder_arrows(depth).items():
        if PurePosixPath(name).parent != here:
            continue
        for other, why in others.items():
            if PurePosixPath(other).parent == here:
                a, b = PurePosixPath(name).name, PurePosixPath(other).name
                assert layer[b] < layer[a], f"{name} imports {other}: {why[:3]}"


def test_no_folder_is_too_full() -> None:
    for top in (*PACKAGES, "tests"):
        for folder in [ROOT / top, *(ROOT / top).rglob("*/")]:
            if "__pycache__" in folder.parts or not folder.is_dir():
                continue
            entries = [path.name for path in folder.iterdir() if path.name != "__pycache__"]
            assert len(entries) <= MOST_ENTRIES, f"{folder.relative_to(ROOT)}: {len(entries)}"


def test_one_name_is_one_thing() -> None:
    """`engine.py` and `eager.py` are twice the same thing: the backend of it, and it."""
    places = defaultdict(list)
    for path in modules().values():
        if path.name not in ("__init__.py", "__main__.py") and path.parent.name != "deprecated":
            places[path.name].append(str(path.relative_to(ROOT)))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert set(twice) <= {"engine.py", "eager.py"}, twice


def draw() -> None:
    for package in ("kernels", "bench"):
        arrows = folder_arrows(2)
        for name in sorted(arrows):
            if name.startswith(f"{package}/"):
                print(f"{name:<22} -> {' '.join(sorted(arrows[name]))}")
    files, folders = file_arrows(), folder_arrows(9)
    print(f"{len(files)} modules, {sum(map(len, files.values()))} arrows, {floors(files)} floors")
    count = sum(map(len, folders.values()))
    high = floors({name: set(others) for name, others in folders.items()})
    print(f"{len(folders)} folders, {count} arrows, {high} floors")


if __name__ == "__main__":
    draw()
