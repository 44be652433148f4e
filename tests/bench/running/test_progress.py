"""What `resfuse bench` says before, during and after its cases: time left, other work, a table."""

import io
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from report_rows import CASE
from resfuse.bench.cli import parser
from resfuse.bench.measuring.probes import idle
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.results import read_rows
from resfuse.bench.running import conclusion, session
from resfuse.bench.running.progress import TimeLeft, expected_s, line, minutes
from resfuse.bench.running.sweep import expand

FOUND: dict[str, Any] = {
    "facts": {"device_name": "Abacus, 2 cores"}, "env_id": "e1", "commit": "c1", "ceilings": {},
    "unavailable": {"tensorrt": "TensorRT needs an NVIDIA GPU"},
}  # fmt: skip


def passed(speedup: float = 1.5, other_load: float = 0.0, half: float = 0.02) -> Outcome:
    return Outcome("pass", "", {
        "infer_samples_per_sec": 40.0, "train_samples_per_sec": None, "speedup": speedup,
        "speedup_ci_low": speedup - half, "speedup_ci_high": speedup + half,
        "other_load": other_load,
    })  # fmt: skip


def cases_of(*arguments: str) -> list[Case]:
    args = parser().parse_args(["bench", *arguments])
    return expand(replace(session.request_of(args), device="cpu"))


def test_make_bench_measures_what_a_cpu_can_run() -> None:
    """Seven lines for each of two networks at two batch sizes; none of a GPU's backends."""
    cases = cases_of()
    assert len(cases) == 28
    lines = [
        (c.backend, c.memory_format) for c in cases if (c.model, c.batch_size) == ("resnet18", 1)
    ]
    assert lines == [
        ("eager", "contiguous"), ("eager", "channels_last"), ("compiled", "channels_last"),
        ("fused", "channels_last"), ("engine", "channels_last"), ("onnxrt", "contiguous"),
        ("openvino", "contiguous"),
    ]  # fmt: skip


def test_backends_that_are_asked_for_run_in_every_format() -> None:
    formats = [
        c.memory_format for c in cases_of("--backend", "engine", "-m", "resnet18", "-b", "1")
    ]
    assert formats == ["contiguous", "channels_last"]


def test_the_default_run_fits_ten_quiet_minutes() -> None:
    guess = session.guess_of(Options(seconds=2.0), {})
    seconds = sum(map(guess, cases_of()))
    assert 5 * 60 < seconds < 10 * 60
    busy = session.guess_of(Options(seconds=2.0), {"other_load": 1.5})
    assert sum(map(busy, cases_of())) == pytest.approx(seconds + 28 * idle.LIMIT_S["cpu"])


def test_the_time_left_learns_from_the_cases_that_are_done() -> None:
    cases = [replace(CASE, batch_size=batch) for batch in (1, 2, 3, 4)]
    left = TimeLeft(cases, lambda case: 30.0)
    assert left.seconds() == pytest.approx(120)
    left.done(cases[0], 75.0)  # guessed 30; 15 s count for the guess
    assert left.seconds() == pytest.approx(90 * (15 + 75) / (15 + 30))
    assert left.seconds(cases[1], 40.0) == pytest.approx(2 * 60 + 60 - 40)
    assert left.seconds(cases[1], 500.0) == pytest.approx(2 * 60)  # overdue, never negative
    left.done(cases[1], 0.0)  # it needed no process
    assert left.seconds() == pytest.approx(2 * 60)


def test_a_guess_knows_backend_size_and_a_busy_machine() -> None:
    small = expected_s(CASE, 2.0, 1.8, is_busy=False)
    assert expected_s(replace(CASE, backend="engine"), 2.0, 1.8, False) > small
    assert expected_s(CASE, 2.0, 4.1, False) > small
    assert expected_s(replace(CASE, mode="train"), 2.0, 1.8, False) > small
    assert expected_s(CASE, 2.0, 1.8, True) == small + idle.LIMIT_S["cpu"]
    assert [minutes(s) for s in (10, 62, 540)] == [
        "less than a minute", "about 1 minute", "about 9 minutes",
    ]  # fmt: skip


def run(cases: list[Case], folder: Path, outcomes: dict[str, Outcome]) -> str:
    """What is printed while these cases are "measured"."""
    console = Console(width=200, record=True, file=io.StringIO())
    session.run_cases(
        cases, Options(), folder, FOUND, console, measure=lambda c, o, r: outcomes[c.backend]
    )
    return console.export_text()


def test_a_backend_that_cannot_run_is_no_line_a_case_and_still_a_row(tmp_path: Path) -> None:
    """`make bench` says it once, at the top."""
    cases = [
        replace(CASE, backend=b, batch_size=n, memory_format="channels_last")
        for b in ("eager", "tensorrt", "fused")
        for n in (1, 8)
    ]
    gone = Outcome("unavailable", "no such kernel here")  # only a case finds this out
    said = run(cases, tmp_path, {"eager": passed(), "fused": gone})
    assert "TensorRT needs" not in said
    assert said.count("no such kernel here") == 1
    assert "6 rows" in said and "4 unavailable" in said
    assert list(read_rows(tmp_path).status) == ["pass"] * 2 + ["unavailable"] * 4
    told = conclusion.cannot_run({"a": "no GPU", "b": "no GPU", "c": "not installed"})
    assert told == ["Cannot run here: a, b: no GPU", "Cannot run here: c: not installed"]


def test_a_row_beside_other_work_says_so_on_its_line_and_at_the_end() -> None:
    assert line(CASE, passed(other_load=1.26), None).endswith("beside other work: 1.3 cores")
    assert "beside" not in line(CASE, passed(other_load=0.1), None)
    measured = [(CASE, passed(other_load=1.26)), (CASE, passed())]
    assert conclusion.beside_other_work(measured).startswith(
        "1 of 2 rows were taken beside other work (up to 1.3 cores busy)"
    )
    assert conclusion.beside_other_work(measured[1:]) == ""


def test_the_screen_says_how_busy_the_machine_is_and_how_wide_intervals_will_be() -> None:
    calm = {"other_load": 0.03, "busy_with": [], "interval": 0.012}
    assert conclusion.conditions(calm) == (
        "The machine is quiet: expect 95 % intervals of about ±1.2 % of a speed-up."
    )
    busy = {"other_load": 1.42, "busy_with": [("cc1plus", 0.9), ("python", 0.5)], "interval": 0.07}
    said = conclusion.conditions(busy)
    assert "BUSY: other processes use 1.4 cores (cc1plus 0.9, python 0.5)" in said
    assert "±7.0 %" in said
    assert conclusion.conditions({}) == ""  # a dry run does not look


def test_the_end_is_a_table_of_times_faster() -> None:
    measured = []
    for model in ("resnet18", "resnet50"):
        case = replace(CASE, model=model)
        measured += [
            (case, passed(1.01)),
            (replace(case, backend="engine", memory_format="channels_last"), passed(2.5)),
            (replace(case, backend="fused"), Outcome("timeout", "not done after 300 s")),
            (replace(case, backend="tensorrt"), Outcome("unavailable", "no GPU")),
        ]
    title, (table,) = conclusion.short_tables(measured)
    assert title == "Times faster than eager (±: half of the 95 % interval)"
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table)
    lines = [text.split() for text in console.export_text().splitlines()]
    assert lines == [
        ["resnet18", "resnet50"],
        ["batch", "8", "batch", "8"],
        ["engine", "channels_last", "2.50", "±0.02", "2.50", "±0.02"],
        ["eager", "1.00", "±0.02", "1.00", "±0.02"],
        ["fused", "timeout", "timeout"],
    ]


Times = namedtuple("Times", "user nice system idle iowait irq softirq steal")
Own = namedtuple("Own", "user system children_user children_system")


def test_other_work_is_all_but_this_process_on_the_processors_it_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 10 s on each of two processors: 6 + 5 s busy, 1 of them stolen, 4.5 this process's own."""
    before = [Times(1, 0, 1, 0, 0, 0, 0, 0)] * 3
    after = [
        Times(3, 2, 2, 4, 0, 0, 0, 1),  # 6 s more
        Times(6, 0, 1, 5, 0, 0, 0, 0),  # 5 s more
        Times(99, 0, 1, 0, 0, 0, 0, 0),  # not ours to use
    ]
    readings = iter([before, after])
    own = iter([Own(1, 0, 0, 0), Own(4, 1, 0.25, 0.25)])
    monkeypatch.setattr(idle.psutil, "cpu_times", lambda percpu: next(readings))
    monkeypatch.setattr(
        idle.psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: next(own))
    )
    monkeypatch.setattr(idle.psutil, "process_iter", list)
    monkeypatch.setattr(idle.os, "sched_getaffinity", lambda pid: {0, 1})
    assert idle.OtherWork().cores(10.0) == pytest.approx((6 + 5 - 4.5) / 10)


def test_the_busiest_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(pid: int, name: str, seconds: float) -> SimpleNamespace:
        return SimpleNamespace(
            pid=pid, name=lambda: name, create_time=lambda: 5.0,
            cpu_times=lambda: SimpleNamespace(user=seconds, system=0.0),
        )  # fmt: skip

    readings = iter([
        [process(7, "cc1plus", 50.0), process(8, "cron", 1.0)],
        [process(7, "cc1plus", 59.0), process(8, "cron", 1.1), process(9, "python", 3.0),
         process(10, "python", 1.0), process(os.getpid(), "resfuse", 90.0)],
    ])  # fmt: skip
    monkeypatch.setattr(idle.psutil, "process_iter", lambda: next(readings))
    assert idle.OtherWork().busiest(10.0) == [("cc1plus", 0.9), ("python", 0.4)]
