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
from typing import Any

import pytest
import torch

from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.layers.kernel_check.check_command import SHEET as CONFIGS
from resfuse.bench.layers.kernel_check.check_command import kernels_of, math_modes_of
from resfuse.bench.measuring.failure import outcome_of
from resfuse.bench.measuring.probes import machine
from resfuse.bench.records import results
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Stamp
from resfuse.bench.running import sweep
from resfuse.bench.running.survey import survey
from resfuse.kernels.engine.tuning.tuner import BrokenDevice
from resfuse.tools.gpu_plan import gpu_plan_command as command
from resfuse.tools.gpu_plan import notes, plan_progress
from resfuse.tools.gpu_plan.archive import Places
from resfuse.tools.gpu_plan.execute import bound_s, cases_of, expected_s, parse
from resfuse.tools.gpu_plan.plan_progress import CUT, DONE, FAILED, Progress
from resfuse.tools.gpu_plan.plan_steps import BUDGET_S, PARTS, PROBE, STEPS, SURVEY_S, Step
from resfuse.tools.gpu_plan.restore import restore

pytestmark = pytest.mark.slow

BENCHES = [step for step in STEPS if step.line.startswith("bench")]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("dry_run", [False, True])
def test_every_step_is_a_command_line_of_resfuse(step: Step, dry_run: bool) -> None:
    if step.line == PROBE:
        return
    args = parse(step.line, dry_run)
    if args.command == "check":
        assert kernels_of(args)
        assert ("int8" if step.name == "check-int8" else "fp16") in math_modes_of(args)
        return
    cases = cases_of(step, "cpu" if dry_run else "cuda", dry_run)
    assert args.command == "bench"
    assert all(sweep._unsupported(case, {}) is None for case in cases)
    assert {case.baseline_memory_format for case in cases} == {"channels_last"}
    if dry_run:
        assert {(c.model, c.img_size, c.precision, c.batch_size) for c in cases} == {
            ("resnet18", 32, "int8" if step.name.startswith("int8") else "float32", 2)
        }


def test_the_first_part_fits_the_budget_and_the_headline_300_s() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert [step.part for step in STEPS] == sorted((s.part for s in STEPS), key=PARTS.index)
    at, ends = SURVEY_S, {}
    for step in (step for step in STEPS if step.part == "first"):
        at += expected_s(step)
        ends[step.name] = at
        assert bound_s(step) >= 1.5 * expected_s(step) > 0
    assert ends["engine-256"] <= 175
    assert ends["beside-256"] <= 250
    assert at <= BUDGET_S - command.PACKING_S
    backends = {case.backend for step in BENCHES for case in cases_of(step, "cuda")}
    wanted = {"eager", "compiled_max_autotune", "cudnn_fused", "onnxrt", "fused", "engine"}
    assert wanted <= backends


def test_lists_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-plan", "--list", "--steps", "cudnn-1,engine-1,training"]) == 0
    said = capsys.readouterr().out
    assert said.count("; given up after ") == 3
    peer = "the best peer at batch 1; predicted 0.4 to 0.6 ms; given up after 60"
    assert f"   18    23  cudnn-1 (first): {peer}" in said
    assert "   40    63  engine-1 (first)" in said
    assert "resfuse bench -m resnet50 --precision float16" in said
    assert main(["gpu-plan", "--list", "--part", "first"]) == 0
    said = capsys.readouterr().out
    assert "training" not in said and "int8" not in said
    assert f"  506  {'autotune-256'}" in said


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("resfuse: error: ")
    assert said.count("\n") == 1
    return said


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (
        ["--steps", ","],
        ["--part", "first", "--steps", "training"],
        ["--list", "--steps="],
    ):
        assert "--steps names no step of the parts" in error_of(["gpu-plan", *more], capsys)
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
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


THREE = tuple(Step(name, "first", "this", name) for name in ("one", "two", "three"))
KEPT_S = 5.0


def go(
    tmp_path: Path, needs: dict[str, float], budget: float = 90.0, kept: str = ""
) -> list[tuple[str, float]]:
    """Which steps were taken with which limit; below zero one fails. `kept`: the one whose work is
    kept where it is cut off."""
    clock, log = FakeClock(), list[tuple[str, float]]()

    def run_step(step: Step, time_left: Callable[[], float]) -> str:
        limit = time_left()
        log.append((step.name, limit))
        if needs[step.name] < 0:
            raise RuntimeError("no such luck")
        spent = min(limit, needs[step.name])
        clock.now += spent
        needs[step.name] -= spent
        return DONE if needs[step.name] == 0 else CUT

    def asks(step: Step, rest: bool) -> tuple[float, float]:
        return (KEPT_S if rest and step.name == kept else max(0.0, needs[step.name])), 60.0

    known = plan_progress.load(tmp_path, "env", "commit")
    plan_progress.run(THREE, known, run_step, asks, clock, budget, lambda line: None)
    return log


def ended(tmp_path: Path) -> dict[str, str]:
    return dict(plan_progress.load(tmp_path, "env", "commit").ended)


def test_steps_are_taken_by_worth_and_what_does_not_fit_is_passed_over(tmp_path: Path) -> None:
    needs = {"one": 50.0, "two": 45.0, "three": 30.0}
    assert go(tmp_path, needs) == [("one", 60), ("three", 40)]
    assert ended(tmp_path) == {"one": DONE, "three": DONE}
    assert go(tmp_path, needs) == [("two", 60)]
    assert set(ended(tmp_path).values()) == {DONE}


def test_what_is_left_over_goes_to_a_step_whose_work_is_kept(tmp_path: Path) -> None:
    needs = {"one": 50.0, "two": 55.0, "three": 30.0}
    assert go(tmp_path, needs, kept="two") == [("one", 60), ("three", 40), ("two", 10)]
    assert ended(tmp_path) == {"one": DONE, "three": DONE, "two": CUT}
    assert go(tmp_path, needs, kept="two") == [("two", 60)]


def test_a_failing_step_costs_itself_and_comes_last_the_next_time(tmp_path: Path) -> None:
    needs = {"one": -1.0, "two": 10.0, "three": 85.0}
    assert [name for name, _ in go(tmp_path, needs)] == ["one", "two"]
    assert ended(tmp_path) == {"one": FAILED, "two": DONE}
    needs.update(one=5.0, three=40.0)
    assert [name for name, _ in go(tmp_path, needs)] == ["three", "one"]
    assert set(ended(tmp_path).values()) == {DONE}


def test_interrupted_in_a_step_the_others_stay_done(tmp_path: Path) -> None:
    def interrupted(step: Step, time_left: Callable[[], float]) -> str:
        if step.name == "two":
            raise KeyboardInterrupt
        return DONE

    known = plan_progress.load(tmp_path, "env", "commit")
    with pytest.raises(KeyboardInterrupt):
        plan_progress.run(
            THREE, known, interrupted, lambda *_: (1.0, 9.0), FakeClock(), 90, lambda line: None
        )
    assert ended(tmp_path) == {"one": DONE}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"env_id": "env", "commit": "commit"}',
     '{"env_id": "env", "commit": "older", "steps": {"one": "done"}}',
     '{"env_id": "other", "commit": "commit", "steps": {"one": "done"}}'],
)  # fmt: skip
def test_a_damaged_or_foreign_state_is_no_state(content: str, tmp_path: Path) -> None:
    (tmp_path / plan_progress.FILE).write_text(content)
    assert ended(tmp_path) == {}


def test_a_state_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    known = Progress(tmp_path / "missing" / plan_progress.FILE, "env", "commit")
    with pytest.raises(UsageError, match="cannot be written"):
        known.note("one", DONE)


CASE = Case("resnet18", "eager", "inference", "cpu", "float32", "contiguous", 1, 32)
FOUND = {
    "ceilings": {"ceiling_copy_gb_s": "10", "ceiling_ieee_tflops": "0.1"},
    "facts": {"device_name": "an abacus"},
    "env_id": "env",
    "commit": "commit",
}


def swept(
    tmp_path: Path, fake: Callable[[Case, Options], Outcome], left: Callable[[], float], **more: Any
) -> tuple[int, list[str]]:
    """Batches of 1, 2 and 3 images: how many were left out, and what was said."""
    said: list[str] = []
    cases = [replace(CASE, batch_size=n) for n in (1, 2, 3)]
    left_out = sweep.run(
        cases, Options(timeout_s=50), tmp_path, FOUND, lambda case: None, lambda *_: None, left,
        lambda case, options, _: fake(case, options), say=said.append, **more,
    )  # fmt: skip
    return left_out, said


def test_a_case_cut_off_leaves_no_row_and_the_others_their_turn(tmp_path: Path) -> None:
    """The second does not come to an end in 29 s, the third takes 6 of the 10 that are left."""
    clock, limits = FakeClock(), list[float]()

    def fake(case: Case, options: Options) -> Outcome:
        limits.append(options.timeout_s)
        clock.now += {1: 30, 2: 19, 3: 6}[case.batch_size]
        return Outcome("timeout", "cut off") if case.batch_size == 2 else Outcome("pass")

    left_out, said = swept(tmp_path, fake, lambda: 59 - clock.now)
    assert limits == [50, 29, 10]
    assert left_out == 1
    assert list(results.read_rows(tmp_path).requested_batch_size) == [1, 3]
    assert ["cut off, no time is left for it" in line for line in said] == [True]


def test_a_case_that_does_not_fit_is_passed_over_for_a_cheaper_one(tmp_path: Path) -> None:
    clock = FakeClock()

    def fake(case: Case, options: Options) -> Outcome:
        clock.now += 20
        return Outcome("pass")

    left_out, said = swept(
        tmp_path,
        fake,
        lambda: 50 - clock.now,
        expected=lambda c: {1: 20, 2: 31, 3: 20}[c.batch_size],
    )
    assert left_out == 1
    assert list(results.read_rows(tmp_path).requested_batch_size) == [1, 3]
    assert "batch 2: left for later, it takes some 31 s and 30 s are left" in said[0]


def test_a_lost_process_is_tried_once_more_and_the_row_says_so(tmp_path: Path) -> None:
    begun: list[int] = []

    def fake(case: Case, options: Options) -> Outcome:
        begun.append(case.batch_size)
        if case.batch_size == 3 or begun.count(case.batch_size) == 1:
            return Outcome("fail_to_run", f"lost {len(begun)}", again=case.batch_size > 1)
        return Outcome("pass")

    swept(tmp_path, fake, lambda: 1e9)
    assert begun == [1, 2, 2, 3, 3]
    rows = results.read_rows(tmp_path)
    assert list(rows.status) == ["fail_to_run", "pass", "fail_to_run"]
    assert list(rows.error) == [
        "lost 1", "a first process failed: lost 2", "lost 5; a first process failed: lost 4",
    ]  # fmt: skip


def test_a_broken_device_asks_for_a_new_process() -> None:
    broken = RuntimeError("the engine could not be built")
    broken.__cause__ = BrokenDevice("tile 3 broke the GPU")
    assert outcome_of(broken).again
    assert outcome_of(BrokenDevice("tile 3")).again
    assert not outcome_of(RuntimeError("tile 3")).again


def test_a_backend_that_the_survey_found_missing_costs_no_process(tmp_path: Path) -> None:
    found = {**FOUND, "unavailable": {"eager": "there is none"}}
    sweep.run(
        [CASE], Options(), tmp_path, found, lambda case: None, lambda *_: None,
        measure=lambda *_: pytest.fail("a process was asked"),
    )  # fmt: skip
    assert list(results.read_rows(tmp_path).error) == ["there is none"]


def test_the_survey_asks_backends_and_measures_no_ceiling_twice() -> None:
    request = replace(command._request("cpu", STEPS), backends=["eager", "cudnn_fused"])
    found = survey(request, 0, ceilings=False)
    assert set(found["unavailable"]) == {"cudnn_fused"}
    assert "need an NVIDIA GPU" in found["unavailable"]["cudnn_fused"]
    known = {"ceiling_copy_gb_s": "12.5", "ceiling_ieee_tflops": "1.5"}
    slower = {**known, "ceiling_ieee_tflops": "1.2", "triton": "another"}
    there = [{**found["facts"], **ceilings} for ceilings in (slower, known)]
    again = survey(request, 0, ceilings=True, known=there)
    assert again["ceilings"] == known
    other = {**found["facts"], **known, "torch": "another"}
    assert machine.known_ceilings(found["facts"], [other]) == {}


def test_notes_come_from_the_rows_and_are_written_once(tmp_path: Path) -> None:
    results.record_environment(tmp_path, "env", {**FOUND["facts"], **FOUND["ceilings"]})
    metrics = {
        "p50_ms": 12.5, "infer_samples_per_sec": 80.0, "speedup": 2.0, "speedup_ci_low": 1.9,
        "speedup_ci_high": 2.1, "sol_pct": 44.0, "rounds": 10,
    }  # fmt: skip
    stamp = Stamp("an abacus", "env", "commit", "2026-01-01T00:00:00+00:00")
    results.append_row(tmp_path, CASES.record(CASE.identity(), Outcome("oom", "full"), stamp))
    assert notes.write_if_missing(tmp_path) is None  # nothing passed
    results.append_row(tmp_path, CASES.record(CASE.identity(), Outcome("pass", "", metrics), stamp))
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
    """A dry run that got SIGINT once the engine had its first row: where, code, words.

    As a user would, it presses again where nothing happens: Python prints and forgets what is
    raised within a finalizer, and that may be the interrupt.
    """
    root = tmp_path_factory.mktemp("dry-run")
    process = subprocess.Popen(
        dry_run(root, sys.executable),
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


def dry_run(root: Path, python: str, *more: str) -> list[str]:
    steps = ["--steps", "probe,engine-1,fused,int8-256,check-fp16,onnxrt"]
    command = [python, "-m", "resfuse.bench", "gpu-plan", "--dry-run", *steps]
    archive = ["--archive", str(root.with_suffix(".tar.xz"))]
    return [*command, "--results", str(root), "--budget", "5400", *archive, *more]


def test_a_dry_run_that_is_cut_off_keeps_its_rows_and_resumes(
    cut_off: tuple[Path, int, list[str]], tmp_path: Path, forked_python: str
) -> None:
    folder, code, said = cut_off
    assert code == 130
    assert said[-1] == "resfuse: interrupted; the rows measured so far are kept"
    state = json.loads((folder / plan_progress.FILE).read_text())["steps"]
    assert state["probe"] == DONE
    assert "onnxrt" not in state
    answers = json.loads((folder / "probe.json").read_text())["answers"]
    assert {name: answer["status"] for name, answer in answers.items()} == {
        "conv + relu": "unavailable", "stem": "pass", "split_k": "pass", "resident tail": "pass",
        "projection": "pass", "int8": "pass", "int8 by descriptors": "pass", "to int8": "pass",
        "max-pool in int8": "pass",
    }  # fmt: skip
    before = results.read_rows(folder)
    assert before.backend[0] == "engine"
    assert len(before) < 3
    archived = folder.parent.with_suffix(".tar.xz")
    restore(archived, Places(tmp_path, tmp_path / "timings", None))
    assert len(results.read_rows(tmp_path / folder.name)) == len(before)

    done = subprocess.run(
        dry_run(folder.parent, forked_python, "--resume"),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "probe:" not in done.stderr  # it is done
    assert "check-fp16: done" in done.stderr
    assert "Kernels are assembled by ptxas " in done.stderr
    rows = results.read_rows(folder)
    assert list(rows.timestamp)[: len(before)] == list(before.timestamp)
    assert list(rows.backend) == ["engine", "fused", "engine", "onnxrt"]
    assert list(rows.precision) == ["float32", "float32", "int8", "float32"]
    assert list(rows.status) == ["pass"] * 4, list(rows.error)
    configs = results.read_rows(folder, CONFIGS)
    assert set(configs.math_mode) == {"fp16"}
    assert set(json.loads((folder / plan_progress.FILE).read_text())["steps"].values()) == {DONE}
    assert (folder / "REPORT.md").exists()
    assert "resnet18, float32, batch 2, 32 pixels" in (folder / "NOTES.md").read_text()
    explained = (folder / "engine-resnet18-float32-b2.txt").read_text()
    assert explained.startswith("resnet18 engine channels_last float32 batch 2\n")
    assert "tactic" in explained
    assert (folder / "engine-resnet18-int8-b2.txt").exists()
