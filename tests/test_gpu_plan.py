"""`resfuse gpu-plan`: its command lines, its budget, resuming, and a dry run that is cut off."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resfuse.bench import results, sweep
from resfuse.bench.bench_command import request_of
from resfuse.bench.case import Case, Options
from resfuse.bench.cli import main
from resfuse.bench.engine_command import case_of
from resfuse.bench.errors import UsageError
from resfuse.bench.gpu_plan import notes, progress
from resfuse.bench.gpu_plan.execute import COMMANDS, parse
from resfuse.bench.gpu_plan.progress import CUT, DONE, FAILED, Progress, Runner
from resfuse.bench.gpu_plan.steps import BUDGET_S, STEPS, Step
from resfuse.bench.kernels.check_command import kernels_of
from resfuse.bench.row import Outcome, Stamp, record

LINES = [line for step in STEPS for line in step.commands]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("dry_run", [False, True])
def test_every_command_line_is_one_of_resfuse(line: str, dry_run: bool) -> None:
    args = parse(line, dry_run)
    assert args.command in COMMANDS
    if args.command == "bench":
        request = replace(request_of(args), device="cpu" if dry_run else "cuda")
        cases = sweep.expand(request)
        assert all(sweep._unsupported(case) is None for case in cases)
        assert {case.baseline_memory_format for case in cases} == {"channels_last"}
        if dry_run:
            assert {(c.model, c.img_size, c.precision, c.batch_size) for c in cases} == {
                ("resnet18", 32, "float32", 2)
            }
    elif args.command == "engine":
        args.device = "cpu"
        assert case_of(args).model == ("resnet18" if dry_run else "resnet50")
    else:
        assert kernels_of(args)


def test_the_steps_fill_the_budget() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert sum(step.bound_s for step in STEPS) == BUDGET_S
    backends = {
        case.backend
        for line in LINES
        if line.startswith("bench")
        for case in sweep.expand(replace(request_of(parse(line, False)), device="cuda"))
    }
    wanted = {"eager", "compiled_max_autotune", "cudnn_fused", "onnxrt", "fused", "engine"}
    assert wanted <= backends


def test_lists_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-plan", "--list", "--budget", "1080", "--steps", "k*,headline"]) == 0
    said = capsys.readouterr().out
    assert "2 steps, at the most 500 s. fp8 is left out." in said
    assert "kernels, 160 s: every configuration" in said
    assert "  resfuse bench -m resnet50 --precision float16" in said
    assert "training" not in said


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("resfuse: error: ")
    assert said.count("\n") == 1
    return said


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps: unknown name 'headlin'" in error_of(["gpu-plan", "--steps", "headlin"], capsys)
    assert "--budget: '0'" in error_of(["gpu-plan", "--budget", "0"], capsys)
    (tmp_path / "file").write_text("")
    there = ["--results", str(tmp_path / "file" / "r")]
    assert "cannot be written" in error_of(["gpu-plan", "--dry-run", *there], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the plan would take")
def test_refuses_a_machine_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(["gpu-plan", "--results", str(tmp_path)], capsys)
    assert "needs a CUDA device" in error
    assert "--dry-run" in error


class FakeClock:
    """Time passes when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def runner(clock: FakeClock, needs: dict[str, float], log: list[tuple[str, float]]) -> Runner:
    """Steps that take so many seconds, spread over as many turns as they are given."""

    def run_step(step: Step, time_left: Callable[[], float]) -> bool:
        limit = time_left()
        log.append((step.name, limit))
        if needs[step.name] < 0:
            raise RuntimeError("no such luck")
        spent = min(limit, needs[step.name])
        clock.now += spent
        needs[step.name] -= spent
        return needs[step.name] == 0

    return run_step


THREE = tuple(Step(name, "this", BUDGET_S / 3, ()) for name in ("one", "two", "three"))


def go(tmp_path: Path, needs: dict[str, float], budget: float = 90.0) -> list[tuple[str, float]]:
    clock, log = FakeClock(), list[tuple[str, float]]()
    known = progress.load(tmp_path, "env", "commit")
    progress.run(THREE, known, runner(clock, needs, log), clock, budget, lambda line: None)
    return log


def ended(tmp_path: Path) -> dict[str, str]:
    return dict(progress.load(tmp_path, "env", "commit").ended)


def test_a_step_stops_at_its_bound_and_goes_on_with_what_the_others_left(tmp_path: Path) -> None:
    log = go(tmp_path, {"one": 45, "two": 10, "three": 10})
    assert log == [("one", 30), ("two", 30), ("three", 30), ("one", 40)]
    assert ended(tmp_path) == {"one": DONE, "two": DONE, "three": DONE}


def test_nothing_goes_past_the_budget_and_the_rest_is_resumed(tmp_path: Path) -> None:
    needs = {"one": 30.0, "two": 70.0, "three": 28.0}
    assert go(tmp_path, needs) == [("one", 30), ("two", 30), ("three", 30)]
    assert ended(tmp_path) == {"one": DONE, "two": CUT, "three": DONE}
    assert go(tmp_path, needs) == [("two", 30), ("two", 60)]  # 40 were left to do
    assert ended(tmp_path)["two"] == DONE


def test_a_failing_step_costs_itself(tmp_path: Path) -> None:
    needs = {"one": -1.0, "two": 10.0, "three": 10.0}
    assert [name for name, _ in go(tmp_path, needs)] == ["one", "two", "three"]
    assert ended(tmp_path) == {"one": FAILED, "two": DONE, "three": DONE}
    needs["one"] = 5.0
    assert [name for name, _ in go(tmp_path, needs)] == ["one"]
    assert set(ended(tmp_path).values()) == {DONE}


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    assert go(tmp_path, {"one": 1, "two": 1, "three": 1}, budget=4) == []
    assert ended(tmp_path) == {}


def test_interrupted_in_a_step_the_others_stay_done(tmp_path: Path) -> None:
    clock = FakeClock()

    def interrupted(step: Step, time_left: Callable[[], float]) -> bool:
        if step.name == "two":
            raise KeyboardInterrupt
        return True

    known = progress.load(tmp_path, "env", "commit")
    with pytest.raises(KeyboardInterrupt):
        progress.run(THREE, known, interrupted, clock, 90, lambda line: None)
    assert ended(tmp_path) == {"one": DONE}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"env_id": "env", "commit": "commit"}',
     '{"env_id": "env", "commit": "older", "steps": {"one": "done"}}',
     '{"env_id": "other", "commit": "commit", "steps": {"one": "done"}}'],
)  # fmt: skip
def test_a_damaged_or_foreign_state_is_no_state(content: str, tmp_path: Path) -> None:
    (tmp_path / progress.FILE).write_text(content)
    assert ended(tmp_path) == {}


def test_a_state_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    known = Progress(tmp_path / "missing" / progress.FILE, "env", "commit")
    with pytest.raises(UsageError, match="cannot be written"):
        known.note("one", DONE)


CASE = Case("resnet18", "eager", "inference", "cpu", "float32", "contiguous", 1, 32)
FOUND = {
    "ceilings": {"ceiling_copy_gb_s": "10", "ceiling_ieee_tflops": "0.1"},
    "facts": {"device_name": "an abacus"},
    "env_id": "env",
    "commit": "commit",
}


def test_a_sweep_keeps_to_its_time(tmp_path: Path) -> None:
    """The first case is measured, the second cut off without a row, the third not begun."""
    clock, limits = FakeClock(), list[float]()

    def fake(case: Case, options: Options, ceilings: dict[str, float]) -> Outcome:
        limits.append(options.timeout_s)
        clock.now += 30
        return Outcome("pass") if len(limits) == 1 else Outcome("timeout", "cut off")

    cases = [replace(CASE, batch_size=n) for n in (1, 2, 3)]
    left_out = sweep.run(
        cases, Options(timeout_s=50), tmp_path, FOUND, lambda case: None, lambda *_: None,
        lambda: 59 - clock.now, fake,
    )  # fmt: skip
    assert limits == [50, 29]
    assert left_out == 2
    assert list(results.read_rows(tmp_path).requested_batch_size) == [1]


def test_notes_come_from_the_rows_and_are_written_once(tmp_path: Path) -> None:
    results.record_environment(tmp_path, "env", {**FOUND["facts"], **FOUND["ceilings"]})
    metrics = {
        "p50_ms": 12.5, "infer_samples_per_sec": 80.0, "speedup": 2.0, "speedup_ci_low": 1.9,
        "speedup_ci_high": 2.1, "sol_pct": 44.0, "rounds": 10,
    }  # fmt: skip
    stamp = Stamp("an abacus", "env", "commit", "2026-01-01T00:00:00+00:00")
    results.append_row(tmp_path, record(CASE, Outcome("oom", "full"), stamp))
    assert notes.write_if_missing(tmp_path) is None  # nothing passed
    results.append_row(tmp_path, record(CASE, Outcome("pass", "", metrics), stamp))
    written = notes.write_if_missing(tmp_path)
    assert written == tmp_path / "NOTES.md"
    said = written.read_text()
    assert "eager contiguous | 12.5 | 80 | 44 | 2.00 [1.90, 2.10] | eager contiguous" in said
    # ResNet-18 at 32 pixels: 0.0373 GMACs at 0.1 TFLOP/s; 11.7 M weights of 4 bytes at 10 GB/s.
    [limits] = [
        line for line in said.splitlines() if line.startswith("| resnet18") and "0.7" in line
    ]
    flops_ms, bytes_ms = (float(cell) for cell in limits.split("|")[2:4])
    assert flops_ms == pytest.approx(0.746, rel=0.02)
    assert bytes_ms == pytest.approx(4.68, rel=0.01)
    written.write_text("mine")
    assert notes.write_if_missing(tmp_path) is None
    assert written.read_text() == "mine"


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[str]]]:
    """A dry run that got SIGINT once the headline had its first row: where, code, words.

    As a user would, it presses again where nothing happens: Python prints and forgets what is
    raised within a finalizer, and that may be the interrupt.
    """
    root = tmp_path_factory.mktemp("dry-run")
    process = subprocess.Popen(
        dry_run(root),
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would everything started from one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not any(results.has_rows(f) for f in root.iterdir()):
        time.sleep(0.1)
    said = None
    while said is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(timeout=8)
    [folder] = root.iterdir()
    yield folder, process.returncode, said.splitlines()


def dry_run(root: Path, *more: str) -> list[str]:
    steps = ["--steps", "facts,kernels,headline", "--budget", "5400"]
    command = [sys.executable, "-m", "resfuse.bench", "gpu-plan", "--dry-run", *steps]
    return [*command, "--results", str(root), *more]


def test_a_dry_run_that_is_cut_off_keeps_its_rows_and_resumes(
    cut_off: tuple[Path, int, list[str]],
) -> None:
    folder, code, said = cut_off
    assert code == 130
    assert said[-1] == "resfuse: interrupted; the rows measured so far are kept"
    state = json.loads((folder / progress.FILE).read_text())["steps"]
    assert state == {"facts": DONE, "kernels": DONE}
    before = results.read_rows(folder)
    assert before.backend[0] == "eager"
    assert len(before) < 5
    configs = (folder / "configs.csv").read_text()

    done = subprocess.run(
        dry_run(folder.parent, "--resume"), stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kernels:" not in done.stderr  # it is done
    assert "headline: done" in done.stderr
    assert "Kernels are assembled by ptxas " in done.stderr
    rows = results.read_rows(folder)
    assert list(rows.timestamp)[: len(before)] == list(before.timestamp)
    assert list(rows.backend) == ["eager", "fused", "engine", "cudnn_fused", "onnxrt"]
    expected = ["pass", "pass", "pass", "unavailable", "pass"]
    assert list(rows.status) == expected, list(rows.error)
    assert (folder / "configs.csv").read_text() == configs
    assert set(json.loads((folder / progress.FILE).read_text())["steps"].values()) == {DONE}
    assert (folder / "REPORT.md").exists()
    assert "resnet18, float32, batch 2, 32 pixels" in (folder / "NOTES.md").read_text()
