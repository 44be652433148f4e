"""The archive of a plan: what is in it, how large it may be, and where its parts go at home."""

import contextlib
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.records import results
from resfuse.bench.records.case import Case
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Stamp
from resfuse.kernels.tuning_cache.timing_cache import TimingCache
from resfuse.tools.gpu_plan import archive
from resfuse.tools.gpu_plan.archive import LIMIT_BYTES, Places, pack, unpack
from resfuse.tools.gpu_plan.restore import restore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("resnet50", "engine", "inference", "cuda", "float16", "channels_last", 256, 224)
STAMP = Stamp("an abacus", "env", "commit", "2026-01-01T00:00:00+00:00")
FACTS = {"device_name": "an abacus", "ceiling_copy_gb_s": "10"}
METRICS = {"p50_ms": 5.0, "infer_samples_per_sec": 51_200.0}


def add_row(folder: Path, batch_size: int) -> None:
    case = replace(CASE, batch_size=batch_size)
    results.append_row(folder, CASES.record(case.identity(), Outcome("pass", "", METRICS), STAMP))


def places(root: Path) -> Places:
    return Places(root / "results", root / "timings", root / "inductor")


@pytest.fixture
def away(tmp_path: Path) -> tuple[Places, Path]:
    """What a plan leaves on a lent machine: places, and the folder of its results."""
    there = places(tmp_path / "away")
    folder = there.results / "an-abacus"
    results.record_environment(folder, "env", FACTS)
    add_row(folder, 256)
    add_row(folder, 1)
    (folder / "probe.json").write_text('{"answers": {}}')
    (folder / "engine-resnet50-float16-b256.txt").write_text("a table")
    (folder / "NOTES.md").write_text("the machine's notes")
    (folder / "speedup.png").write_bytes(b"a plot")
    cache = TimingCache(torch.device("cpu"), there.timings)
    cache.put(("conv", "tile 1"), 0.5)
    cache.put(("conv", "tile 2"), None, "wrong")
    add_kernel(there, "aa/small.py", b"def kernel(): ...")
    return there, folder


def add_kernel(there: Places, name: str, content: bytes) -> None:
    assert there.inductor is not None
    path = there.inductor / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_everything_comes_home_and_nothing_is_doubled(
    away: tuple[Places, Path], tmp_path: Path
) -> None:
    there, folder = away
    file = tmp_path / "out" / "plan.tar.xz"
    assert pack(file, folder, there) == ""
    assert not list(file.parent.glob("*.tmp"))
    home = places(tmp_path / "home")
    mine = home.results / "an-abacus"
    results.record_environment(mine, "env", {**FACTS, "ceiling_copy_gb_s": "9"})
    add_row(mine, 32)
    add_row(mine, 1)  # as it stands in the archive
    (mine / "NOTES.md").write_text("mine")
    TimingCache(torch.device("cpu"), home.timings).put(("conv", "tile 3"), 0.25)

    folders, said = restore(file, home)
    assert folders == [mine]
    assert any(line.startswith("1 new rows in ") for line in said)
    assert list(results.read_rows(mine).requested_batch_size) == [32, 1, 256]
    assert results.read_environments(mine)["env"]["ceiling_copy_gb_s"] == "10"
    assert (mine / "NOTES.md").read_text() == "mine"
    assert (mine / "probe.json").read_text() == '{"answers": {}}'
    assert (mine / "engine-resnet50-float16-b256.txt").read_text() == "a table"
    assert not (mine / "speedup.png").exists()
    cache = TimingCache(torch.device("cpu"), home.timings)
    times = [cache.get(("conv", f"tile {n}")) for n in (1, 2, 3)]
    assert times == [0.5, None, 0.25]
    assert home.inductor is not None
    assert (home.inductor / "aa/small.py").read_bytes() == b"def kernel(): ..."

    before = {path: path.read_bytes() for path in sorted(mine.iterdir())}
    times_before = cache.path.read_bytes()
    restore(file, home)
    assert {path: path.read_bytes() for path in sorted(mine.iterdir())} == before
    assert cache.path.read_bytes() == times_before


def test_what_a_compiler_deletes_meanwhile_is_left_out(
    away: tuple[Places, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile's cache is others': a file of it goes between being listed and being read."""
    there, folder = away
    add_kernel(there, "aa/gone.py", b"")
    wanted = archive._wanted

    def listed(*given: object) -> Iterator[tuple[str, Path]]:
        for name, path in wanted(*given):  # type: ignore[arg-type]
            if path.name == "gone.py":
                path.unlink()
            yield name, path

    monkeypatch.setattr(archive, "_wanted", listed)
    assert pack(tmp_path / "plan.tar.xz", folder, there) == ""
    inside = unpack(tmp_path / "plan.tar.xz")
    assert "inductor/aa/small.py" in inside and "inductor/aa/gone.py" not in inside


def test_the_archive_keeps_to_its_limit_largest_first_out(
    away: tuple[Places, Path], tmp_path: Path
) -> None:
    there, folder = away
    noise = random.Random(0)
    for index, kilobytes in enumerate((300, 60, 40, 20)):
        add_kernel(there, f"bb/{index}.bin", noise.randbytes(kilobytes << 10))
    file = tmp_path / "plan.tar.xz"
    said = pack(file, folder, there, limit_bytes=100 << 10)
    assert file.stat().st_size <= 100 << 10
    assert "2 files of 0 MB found no room" in said
    inside = unpack(file)
    assert "results/an-abacus/rows.csv" in inside
    assert [name for name in inside if name.endswith(".bin")] == [
        "inductor/bb/3.bin", "inductor/bb/2.bin",
    ]  # fmt: skip
    # Where nothing fits but the rows, the rows it is.
    pack(file, folder, there, limit_bytes=6 << 10)
    assert file.stat().st_size <= 6 << 10
    assert "results/an-abacus/rows.csv" in unpack(file)
    assert LIMIT_BYTES < 30 << 20


def test_a_row_that_was_being_written_is_left_out(
    away: tuple[Places, Path], tmp_path: Path
) -> None:
    there, folder = away
    with (folder / "rows.csv").open("a") as rows:
        rows.write("resnet50,224,,5")
    pack(tmp_path / "plan.tar.xz", folder, there)
    home = places(tmp_path / "home")
    restore(tmp_path / "plan.tar.xz", home)
    assert list(results.read_rows(home.results / "an-abacus").requested_batch_size) == [256, 1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"no archive", "cannot be read"),
        (lzma.compress(b"no tar" * 999), "cannot be read"),
    ],
)
def test_what_is_no_archive_is_said(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar.xz").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        restore(tmp_path / "x.tar.xz", places(tmp_path))
    with pytest.raises(UsageError, match="cannot be read"):
        restore(tmp_path / "absent.tar.xz", places(tmp_path))


def test_a_whole_archive_cut_off_is_said(away: tuple[Places, Path], tmp_path: Path) -> None:
    there, folder = away
    file = tmp_path / "plan.tar.xz"
    pack(file, folder, there)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UsageError, match="cannot be read"):
        restore(file, places(tmp_path / "home"))
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", ["../out", "/out", "timings/../../out.jsonl"])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "x.tar.xz").write_bytes(lzma.compress(buffer.getvalue()))
    with pytest.raises(UsageError, match="leads elsewhere"):
        restore(tmp_path / "x.tar.xz", places(tmp_path / "home"))


def test_the_command_restores_and_writes_the_report(
    away: tuple[Places, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there, folder = away
    pack(tmp_path / "plan.tar.xz", folder, there)
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    words = ["gpu-plan", "--restore", str(tmp_path / "plan.tar.xz")]
    assert main([*words, "--results", str(tmp_path / "home")]) == 0
    said = capsys.readouterr().err
    assert "2 new rows in" in said
    assert (tmp_path / "home/an-abacus/REPORT.md").exists()
    assert list((tmp_path / "cache/timings").glob("*.jsonl"))
    assert main([*words[:2], str(tmp_path / "absent")]) == 2


def test_the_script_runs_without_an_installation_and_sigterm_leaves_an_archive(
    tmp_path: Path,
) -> None:
    """A dry run of the script, ended as a machine's time limit ends it, from a copy of the sources
    without git: rows and state are in the archive, and the sources have a name."""
    copy = tmp_path / "copy"
    for package in ("bench", "kernels", "resnet_ref", "tools"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("*.pyc"))
    file = tmp_path / "plan.tar.xz"
    unset = ("PYTHONPATH", "RESFUSE_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {
        "PYTHON": sys.executable, "RESFUSE_SCRATCH": str(tmp_path / "scratch"),
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
    }  # fmt: skip
    words = ["sh", str(copy / "tools/gpu_plan/run.sh"), "--dry-run", "--steps", "probe,engine-1"]
    process = subprocess.Popen(
        [*words, "--archive", str(file), "--results", str(tmp_path / "results")],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    state = "results/*/gpu-plan.json"
    while process.poll() is None and not list(tmp_path.glob(state)):
        time.sleep(0.05)
    said = None
    while said is None:  # again where the first fell into a finalizer, which forgets it
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(timeout=8)
    assert process.returncode == 143, said
    inside = unpack(file)
    [name] = [name for name in inside if name.endswith("gpu-plan.json")]
    told = json.loads(inside[name])
    assert told["steps"]["probe"] == "done"
    assert told["commit"].startswith("v")
    assert "+" in told["commit"]


@pytest.mark.parametrize("file", ["/proc/x", "/dev/null", "a" * 300, "no/such/folder/x"])
def test_a_place_where_no_archive_can_be_is_refused_before_anything_runs(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gpu-plan", "--dry-run", "--results", str(tmp_path / "results"), "--archive"]
    assert main([*command, str(tmp_path / file)]) == 2
    assert "argument --archive: " in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flag", ["--from", "--archive", "--carried"])
def test_an_archive_is_restored_alone(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu-plan", "--restore", "a.tar.xz", flag, str(tmp_path / "b.tar.xz")]) == 2
    assert f"argument --restore: not with {flag}" in capsys.readouterr().err
