"""Training on two processes of this machine: gloo on the CPU, started by torchrun itself."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from conftest import insert_after
from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.distributed.leader import ENDED, combine
from resfuse.bench.records import results
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.world import launched, require_devices, world_of

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parents[2] / "helpers"
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
]  # fmt: skip
# A process that others stop for minutes is slow and not lost.
LIMIT_S = 600
TOLD = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
}  # fmt: skip

PLANTED = '''"""Backends of which one process ends badly."""
import os, time

def dies(model, example):
    if os.environ["RANK"] == "1":
        print("famous [/last] words", flush=True)
        os.abort()
    return model

def sleeps(model, example):
    time.sleep(3600)
'''

two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two processes need a core each"
)


@two_cores
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(parallel: str) -> None:
    """Each on half of the batch. Without the other's half they would be far off, which is what
    shows that this can fail."""
    done = subprocess.run(
        [*TORCHRUN, str(HERE / "two_processes.py"), parallel],
        capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # beside what the libraries below may say on the same stream
    errors = dict(re.findall(r"(apart|together) (\S+)", done.stdout))
    assert errors.keys() == {"apart", "together"}, done.stdout + done.stderr
    assert float(errors["together"]) < 1e-5
    assert float(errors["apart"]) > 0.1


@pytest.fixture(scope="module")
def cut_off(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """A sweep of three cases: in one a subprocess dies, one passes, and in the third, which sleeps,
    one of torchrun's own processes is killed. Yields its exit code, what it said, its folder."""
    registry = checkout / "resfuse/bench/backends/__init__.py"
    (registry.parent / "planted_parallel.py").write_text(PLANTED)
    entry = 'Backend("resfuse.bench.backends.planted_parallel:{0}", "planted", BOTH, '
    entry += '"resfuse.bench.backends.planted_parallel:{0}")'
    # Cases come in the order of the registry.
    insert_after(registry, "BACKENDS: dict", f'    "dies": {entry.format("dies")},')
    with registry.open("a") as file:
        file.write(f'\nBACKENDS["sleeps"] = {entry.format("sleeps")}\n')
    out = tmp_path_factory.mktemp("together")
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "resfuse.bench", "bench", "--bench", "train", "-m", "cifar_resnet20",
         "-b", "4", "--backend", "dies,eager,sleeps", "--memory-format", "contiguous", "--device",
         "cpu", "--seconds", "0.5", "--timeout", str(LIMIT_S), "--results", str(out)],
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        cwd=checkout, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _wait_until(lambda: _rows(out) == 2 or process.poll() is not None)
        for child in psutil.Process(process.pid).children():
            if child.environ().get("RANK") == "1":
                child.send_signal(signal.SIGKILL)
        said = process.communicate(timeout=LIMIT_S)[1]
    finally:
        process.kill()
        process.wait()
    yield process.returncode, said, next(out.iterdir())


@two_cores
def test_a_process_that_dies_costs_its_case(cut_off: tuple) -> None:
    row = pd.read_csv(cut_off[2] / results.ROWS).set_index("backend").loc["dies"]
    assert row.status == "fail_to_run"
    assert "process 1: the subprocess was killed by SIGABRT: famous [/last] words" in row.error
    assert pd.isna(row.p50_ms)


@two_cores
def test_the_case_after_it_is_one_row_with_the_size_of_the_world(cut_off: tuple) -> None:
    row = pd.read_csv(cut_off[2] / results.ROWS).set_index("backend").loc["eager"]
    assert row.status == "pass", row.error
    assert (row.parallel, row.world_size, row.requested_batch_size) == ("ddp", 2, 4)
    assert row.train_samples_per_sec == pytest.approx(2 * 4e3 / row.train_step_time)
    assert row.train_scaling_pct == pytest.approx(100 * row.train_alone_time / row.train_step_time)
    assert row.train_comm_time == row.train_comm_time  # a number


@two_cores
def test_when_a_process_is_killed_the_rest_end_and_the_rows_stay(cut_off: tuple) -> None:
    code, said, folder = cut_off
    assert code != 0
    assert "SIGKILL" in said  # torchrun names who it was
    assert len(results.read_rows(folder)) == 2
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder.parent) in _line(p)]


def _line(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


def _rows(out: Path) -> int:
    return sum(len(results.read_rows(path.parent)) for path in out.glob(f"*/{results.ROWS}"))


def _wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_more_processes_than_cores_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The leader alone, as torchrun would start it: it never gets to wait for the others."""
    too_many = str(len(os.sched_getaffinity(0)) + 1)
    told = {"WORLD_SIZE": too_many, "LOCAL_WORLD_SIZE": too_many, "MASTER_PORT": _free_port()}
    for name, value in {**TOLD, **told}.items():
        monkeypatch.setenv(name, value)
    bench = ["bench", "--bench", "train", "-m", "cifar_resnet20", "--device", "cpu"]
    assert main([*bench, "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"--nproc-per-node: {too_many} processes on a machine with" in said
    assert said.count("resfuse: error:") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--bench: 'inference'; accepted on several processes: train"),
        (["--bench", "train", "--device", "cuda:1"], "--device: 'cuda:1'; accepted on several"),
    ],
)
def test_bad_arguments_on_several_processes(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {**TOLD, "MASTER_PORT": _free_port()}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "-m", "cifar_resnet20", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_parallel_without_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-m", "resnet18", "--bench", "train", "--parallel", "ddp"]) == 2
    assert (
        "--parallel: ddp needs processes started by torchrun: torchrun" in capsys.readouterr().err
    )


def test_what_the_launcher_tells() -> None:
    assert launched(TOLD) and not launched({**os.environ, "RANK": "0"})
    assert world_of(TOLD).leads
    with pytest.raises(UsageError, match="WORLD_SIZE: 'two'; accepted: whole numbers"):
        world_of({**TOLD, "WORLD_SIZE": "two"})
    with pytest.raises(UsageError, match="RANK: 2; accepted: 0 to 1"):
        world_of({**TOLD, "RANK": "2"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices here")
def test_processes_without_a_device_are_refused() -> None:
    with pytest.raises(UsageError, match="2 processes on a machine with 0 CUDA devices"):
        require_devices("cuda", 2)


def test_a_row_tells_every_cause_and_no_consequence() -> None:
    passed, wrong = Outcome("pass"), Outcome("fail_accuracy", "relative error 1")
    ended = Outcome("fail_to_run", ENDED)
    assert combine({0: passed, 1: passed}) == passed
    assert combine({0: ended, 1: wrong}) == replace(wrong, error="process 1: relative error 1")
    both = combine({0: wrong, 1: Outcome("oom", "no memory"), 2: wrong, 3: passed})
    assert both == Outcome("oom", "process 0, 2: relative error 1; process 1: no memory")
