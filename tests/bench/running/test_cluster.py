"""Sweeps as jobs: by submitit's local executor, and on a real Slurm where there can be one."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest

import slurm
from report_rows import CASE, STAMP, add
from resfuse.bench.cli import main
from resfuse.bench.cluster.collect import collect
from resfuse.bench.records import results

pytestmark = pytest.mark.slow

pytest.importorskip("submitit", reason="resfuse sweep needs the extra `cluster`")

# A job that others stop for minutes is slow and not lost.
LIMIT_S = 900
SWEEP = [
    sys.executable, "-m", "resfuse.bench", "sweep", "-m", "cifar_resnet20", "--backend", "eager",
    "--memory-format", "contiguous", "--device", "cpu", "--seconds", "0.5", "--img-size", "32",
]  # fmt: skip


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*SWEEP, "--results", str(tmp_path), *arguments],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def rows_of(folder: Path, inside: str) -> pd.DataFrame:
    """All rows that lie in results folders under `folder`, where `inside` says."""
    found = [results.read_rows(path.parent) for path in folder.glob(f"{inside}/*/{results.ROWS}")]
    return pd.concat(found) if found else pd.DataFrame()


def assert_each_case_once(folder: Path, batches: list[int]) -> None:
    rows = rows_of(folder, ".")
    assert list(rows.status) == ["pass"] * len(batches), rows[["status", "error"]]
    assert sorted(rows.requested_batch_size) == batches


def logs_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("jobs/*/submitit/*.out"))


def test_a_preempted_local_job_goes_on_after_its_last_row(
    begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Two jobs; the first is told to make room once it has a row, and is queued again."""
    process = begin("--launcher", "local", "--shard", "2", "-b", "1,2,3")
    wait_until(lambda: len(rows_of(tmp_path, "jobs/*/0")) == 1)
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a case's own process, which comes and goes
            if "submitit.core._submit" in child.cmdline():
                child.send_signal(signal.SIGUSR2)
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 0, said
    assert "3 cases in 2 jobs" in said
    assert_each_case_once(tmp_path, [1, 2, 3])
    logs = logs_of(tmp_path)
    assert "2 of 2 cases to do" in logs and "1 of 2 cases to do" in logs
    assert list(tmp_path.glob("*/REPORT.md"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.running(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.mark.parametrize(
    "preempt", [("scancel", "--signal=USR2"), ("scontrol", "requeue")], ids=["signal", "requeue"]
)
def test_a_preempted_slurm_job_goes_on_after_its_last_row(
    preempt: tuple[str, str],
    cluster: None,
    begin: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    """With notice (submitit's signal), and by Slurm's own doing."""
    process = begin("--launcher", "slurm", "--shard", "4", "-b", "1,2,3,4", "--cpus", "1")
    wait_until(lambda: len(rows_of(tmp_path, "jobs/*/0")) > 0 or process.poll() is not None)
    (job,) = slurm.said("squeue", "--noheader", "--format=%A").split()
    slurm.said(*preempt, job)
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 0, said
    assert_each_case_once(tmp_path, [1, 2, 3, 4])
    assert re.search("[123] of 4 cases to do", logs_of(tmp_path))


def test_a_job_that_is_cancelled_is_told_of(
    cluster: None, begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = begin("--launcher", "slurm", "-b", "1")
    wait_until(lambda: "R" in slurm.said("squeue", "--noheader", "--format=%t").split())
    (job,) = slurm.said("squeue", "--noheader", "--format=%A").split()
    slurm.said("scancel", job)
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 1
    assert "Job 0 of 1 failed: it ended without a result" in said
    assert "Nothing was measured." in said


def test_a_partition_that_is_none(
    cluster: None, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    process = begin("--launcher", "slurm", "-b", "1", "--partition", "gold")
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 2
    assert "resfuse: error: the job was refused: " in said
    assert "invalid partition" in said


def test_collecting_twice_adds_nothing(tmp_path: Path) -> None:
    """Two jobs of one environment; the second has one row more when it is looked at again."""
    one, other, shared = tmp_path / "0", tmp_path / "1", tmp_path / "shared"
    add(one / "here", CASE)
    add(other / "here", replace(CASE, batch_size=1))
    assert [len(collect(job, shared)) for job in (one, other, one, other)] == [1, 1, 0, 0]
    add(other / "here", replace(CASE, batch_size=2), rate=33.3)
    assert [row["requested_batch_size"] for row in collect(other, shared)] == ["2"]
    assert list(results.read_rows(shared / "here").requested_batch_size) == [8, 1, 2]
    assert results.read_environments(shared / "here") == results.read_environments(one / "here")
    settled = results.settled_cases(shared / "here", STAMP.env_id, STAMP.commit)
    assert results.identity_key(CASE) in settled


def test_a_row_that_is_just_being_written_is_left_for_later(tmp_path: Path) -> None:
    add(tmp_path / "0" / "here", CASE)
    file = tmp_path / "0" / "here" / results.ROWS
    whole = file.read_text()
    file.write_text(whole + whole.splitlines()[1][:40])
    assert len(collect(tmp_path / "0", tmp_path / "shared")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--launcher", "pbs"], "--launcher: invalid choice: 'pbs'"),
        ([], "required: --launcher"),
        (["--launcher", "local", "--shard", "0"], "--shard: 0; accepted: whole numbers from 1"),
        (["--launcher", "local", "-m", "resnet81"], "--model: unknown name 'resnet81'"),
        (["--launcher", "local", "--parallel", "ddp"], "--parallel: ddp needs processes started"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--results", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_machine_without_slurm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["sweep", "--launcher", "slurm"]) == 2
    said = capsys.readouterr().err
    assert "slurm needs Slurm's commands, and sbatch, squeue, scontrol, scancel are not" in said
    assert "accepted here: local" in said
