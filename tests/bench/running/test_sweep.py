"""A sweep in which backends crash, hang and lie: each costs its own row, and the rest goes on.

One sweep over planted backends serves all the tests: every case is a subprocess that imports torch.
The same copy of the sources shows that a model, a backend or a metric is one file and one line.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from conftest import Resfuse, insert_after
from resfuse.bench.records import results
from resfuse.bench.records.case_row import columns

pytestmark = pytest.mark.slow

PLANTED = '''"""Backends that end badly."""
import os, time

def crash(model, example):
    print("famous last words", flush=True)
    os.abort()

def hang(model, example):
    time.sleep(600)

def eat(model, example):
    os.kill(os.getpid(), 9)  # what the kernel does to a process that eats all memory

def allocate(model, example):
    example.new_empty(2**52)

def leave(model, example):
    raise ValueError("first line\\nsecond line")
'''
TWIN = '''"""Eager once more, to show how a backend is added."""

from resfuse.bench.backends.eager import build as build
'''
NETWORK = '''"""A network of one convolution, to show how a model is added."""

from torch import nn


def tiny(num_classes: int = 10, features_only: bool = False) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *head)
'''
METRIC = '''"""Images a second and million parameters, to show how a metric is added."""

from statistics import median

from resfuse.bench.records.sample import Measured


def speed_per_parameter(m: Measured) -> float:
    return 1e9 * m.case.batch_size / median(m.times_ms) / m.param_count
'''
BACKENDS = ("crash", "hang", "eat", "allocate", "leave", "twin")


@pytest.fixture(scope="module")
def contributed(checkout: Path) -> Path:
    """The sources with a model, a backend and a metric added: a file and a line each."""
    package = checkout / "resfuse"
    (package / "bench/backends/planted.py").write_text(PLANTED)
    registry = package / "bench/backends/__init__.py"
    for name in BACKENDS[:-1]:
        line = f'    "{name}": Backend("resfuse.bench.backends.planted:{name}", "planted"),'
        insert_after(registry, "BACKENDS: dict", line)

    (package / "bench/backends/twin.py").write_text(TWIN)
    line = '    "twin": Backend("resfuse.bench.backends.twin:build", "eager once more"),'
    insert_after(registry, "BACKENDS: dict", line)

    (package / "resnet_ref/tiny.py").write_text(NETWORK)
    models = package / "resnet_ref/models.py"
    insert_after(models, "CIFAR: dict", '    "tiny": tiny,')
    insert_after(models, "from torch import nn", "from resfuse.resnet_ref.tiny import tiny")

    (package / "bench/speed_per_parameter.py").write_text(METRIC)
    metrics = package / "bench/records/metrics.py"
    line = '    "speed_per_parameter": Metric(speed_per_parameter, "images/s/M", "added"),'
    insert_after(metrics, "METRICS: dict", line)
    line = "from resfuse.bench.speed_per_parameter import speed_per_parameter"
    insert_after(metrics, "from resfuse.bench.records.sample", line)
    return checkout


@pytest.fixture(scope="module")
def sweep(
    contributed: Path,
    resfuse_in: Callable[[Path], Resfuse],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of the planted sweep and what the command said."""
    out = tmp_path_factory.mktemp("results")
    done = resfuse_in(contributed)(
        "bench", "-m", "tiny", "-b", "2", "--backend", ",".join(BACKENDS), "--device", "cpu",
        "--memory-format", "contiguous", "--seconds", "0.1", "--timeout", "20", "--results", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return next(out.iterdir()), done


@pytest.fixture(scope="module")
def rows(sweep: tuple[Path, subprocess.CompletedProcess[str]]) -> pd.DataFrame:
    return pd.read_csv(sweep[0] / results.ROWS).set_index("backend")


@pytest.mark.parametrize(
    ("backend", "status", "said"),
    [
        ("crash", "fail_to_run", "killed by SIGABRT: famous last words"),
        ("hang", "timeout", "not done after 20 s"),
        ("eat", "oom", "killed by the system (SIGKILL)"),
        ("allocate", "oom", "allocate memory"),
        ("leave", "fail_to_run", "ValueError: first line"),
    ],
)
def test_a_failure_is_a_row_with_its_reason(
    backend: str, status: str, said: str, rows: pd.DataFrame
) -> None:
    assert rows.status[backend] == status
    assert said in rows.error[backend]
    assert pd.isna(rows.p50_ms[backend])  # no speed


def test_the_case_after_the_failures_is_measured(rows: pd.DataFrame) -> None:
    twin = rows.loc["twin"]
    assert twin.status == "pass", twin.error
    assert twin.infer_samples_per_sec == pytest.approx(2e3 / twin.p50_ms)
    assert twin.speedup_ci_low <= twin.speedup <= twin.speedup_ci_high
    assert twin.infer_gmacs == pytest.approx((27 * 8 * 30 * 30 + 80) / 1e9)


def test_a_model_a_backend_and_a_metric_are_a_file_and_a_line_each(rows: pd.DataFrame) -> None:
    twin = rows.loc["twin"]
    assert twin.model == "tiny"
    per_parameter = twin.infer_samples_per_sec / twin.param_count
    assert twin.speed_per_parameter == pytest.approx(per_parameter)
    assert set(columns()) < {"backend", *rows.columns}


def test_the_report_is_written_and_lists_the_failures(
    sweep: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    page = (sweep[0] / "DETAILS.md").read_text()
    assert "famous last words" in page
    assert "twin" in page
    assert "6 rows" in sweep[1].stderr


def test_resume_runs_only_what_is_not_settled(
    sweep: tuple[Path, subprocess.CompletedProcess[str]],
    contributed: Path,
    resfuse_in: Callable[[Path], Resfuse],
) -> None:
    """`twin`, `allocate` and `eat` are settled; a crash and a hang deserve another chance."""
    again = resfuse_in(contributed)(
        "bench", "-m", "tiny", "-b", "2", "--backend", ",".join(BACKENDS), "--device", "cpu",
        "--memory-format", "contiguous", "--results", sweep[0].parent, "--resume", "--dry-run",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "3 cases, 3 already settled" in again.stdout
    assert "twin" not in again.stdout


@pytest.fixture
def start(contributed: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """`start(backends)` begins a sweep into `tmp_path` and lets the test decide its end."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(backends: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "resfuse.bench", "bench", "-m", "tiny", "-b", "2", "--device",
            "cpu", "--backend", backends, "--memory-format", "contiguous",
            "--results", str(tmp_path),
        ]  # fmt: skip
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(contributed)},
            cwd=contributed,
            stderr=subprocess.PIPE,
            # A shell's background jobs ignore Ctrl-C, and so would everything started from one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_until(true: Callable[[], object], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_keeps_the_rows_and_leaves_no_process(
    start: Callable[[str], subprocess.Popen[bytes]], contributed: Path, tmp_path: Path
) -> None:
    process = start("leave,hang")
    wait_until(lambda: list(tmp_path.glob(f"*/{results.ROWS}")))  # the first row; `hang` is next
    wait_until(lambda: _workers_of(contributed))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130
    assert "interrupted; the rows measured so far are kept" in said
    assert len(pd.read_csv(next(tmp_path.glob(f"*/{results.ROWS}")))) == 1
    assert not _workers_of(contributed)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_harness_leaves_no_process(
    start: Callable[[str], subprocess.Popen[bytes]], contributed: Path
) -> None:
    """kill -9 leaves no chance to clean up; the worker notices on its own."""
    process = start("hang")
    wait_until(lambda: _workers_of(contributed))
    process.kill()
    process.wait()
    wait_until(lambda: not _workers_of(contributed))


def _workers_of(checkout: Path) -> list[int]:
    """Processes of that copy of the sources that measure something right now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() != checkout:
                continue
            if b"resfuse.bench.running.worker" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # gone meanwhile
    return found


def test_the_worker_speaks_plain_json(contributed: Path) -> None:
    """The protocol between the processes: one JSON message a line."""
    read, write = os.pipe()
    payload = {"threads": 1, "ceilings": False, "request": {
        "profile": "quick", "device": "cpu", "models": ["tiny"], "backends": ["twin"],
        "batch_sizes": [1], "precisions": [], "memory_formats": [], "modes": ["inference"],
        "img_size": None, "baseline": "eager", "baseline_memory_format": "contiguous",
        "weights": "seeded", "images": "bundled",
    }}  # fmt: skip
    job = {"task": "resfuse.bench.running.survey:take_survey", "payload": payload}
    environment = {**os.environ, "PYTHONPATH": str(contributed)}
    command = [sys.executable, "-m", "resfuse.bench.running.worker", str(write)]
    subprocess.run(
        command, input=json.dumps(job), text=True, env=environment, pass_fds=[write], check=True
    )
    os.close(write)
    with os.fdopen(read) as messages:
        message = json.loads(messages.read())
    assert message["event"] == "result"
    assert message["facts"]["threads"] == "1"
    assert message["folder"].endswith(f"-{message['facts']['cpu_cores']}-cores")
