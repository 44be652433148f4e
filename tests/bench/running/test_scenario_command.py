"""`--scenario`: what is refused, what identifies a row, and that no page mixes scenarios."""

import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from report_rows import CASE, STAMP, add, add_failed, text_of
from resfuse.bench.cli import main, parser
from resfuse.bench.cluster import sweep_command
from resfuse.bench.common.errors import UsageError
from resfuse.bench.records import results
from resfuse.bench.records.case import Case, Options, Request
from resfuse.bench.records.case_row import CASES, LOAD
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.report import write_report
from resfuse.bench.report.data.ladder import networks
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.running import conclusion, session, subprocess_runner, sweep
from resfuse.bench.running.listing import cases_table
from resfuse.bench.running.progress import expected_s, line
from resfuse.kernels.cpu.cpus import usable

THROUGHPUT = replace(CASE, scenario="throughput")
SERVER = replace(CASE, scenario="server", qps=50.0)
MOST = replace(CASE, scenario="server", latency_bound_ms=15.0)
LOADS = [
    CASE,
    THROUGHPUT,
    SERVER,
    replace(SERVER, qps=60.0),
    MOST,
    replace(MOST, latency_bound_ms=20.0),
]


def request_of(*arguments: str) -> Request:
    return session.request_of(parser().parse_args(["bench", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--qps 5", "argument --qps: 5; it goes with --scenario server"),
        ("--qps max", "argument --qps: max; it goes with --scenario server"),
        ("--scenario throughput --qps 5", "argument --qps: 5; it goes with --scenario server"),
        ("--latency-bound 5", "argument --latency-bound: 5; it goes with --scenario server"),
        ("--scenario server", "server needs --qps N, or --qps max with --latency-bound MS"),
        ("--scenario server --qps max", "argument --qps: max needs --latency-bound MS"),
        ("--scenario server --qps 0", "argument --qps: '0'; accepted: numbers above 0, max"),
        ("--scenario server --qps -3", "argument --qps: '-3'; accepted: numbers above 0, max"),
        ("--scenario server --qps nan", "argument --qps: 'nan'; accepted: numbers above 0, max"),
        ("--scenario server --qps inf", "argument --qps: 'inf'; accepted: numbers above 0, max"),
        ("--scenario server --qps many", "argument --qps: 'many'; accepted: numbers above 0, max"),
        (
            "--scenario server --qps max --latency-bound 0",
            "argument --latency-bound: '0'; accepted: numbers above 0",
        ),
        (
            "--scenario server --qps 5 --latency-bound 9",
            "argument --latency-bound: 9; it goes with --qps max, and --qps 5 is given",
        ),
        (
            "--scenario server --qps 1",
            "argument --qps: 1; the 662 queries that a 99th percentile needs take 662 s, more than "
            "--timeout 300",
        ),
        ("--scenario server --qps 50 --ab eager,fused", "argument --ab: with --scenario server"),
        ("--scenario server --qps 50 --ci 2%", "argument --ci: with --scenario server each "),
        (
            "--scenario server --qps 50 --seed -1",
            "argument --seed: -1; accepted with --scenario server: whole numbers from 0",
        ),
        ("--scenario server --qps 50 --baseline fused", "argument --baseline: with --scenario"),
        (
            "--scenario throughput --bench train",
            "argument --bench: train; --scenario throughput is a way to run inference",
        ),
        (
            "--scenario server --qps 50 --bench inference,train",
            "argument --bench: train; --scenario server is a way to run inference",
        ),
        (
            "--scenario server --qps 50 --device cuda",
            "argument --device: cuda; --scenario server measures streams on a CPU: give --device",
        ),
        ("--scenario throughput --device cuda:1", "argument --device: cuda:1; --scenario thr"),
        ("--scenario burst", "argument --scenario: invalid choice: 'burst'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(
    arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    assert main(["bench", "--results", str(folder), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfuse: error: ") and error.count("\n") == 1
    assert said in error
    assert not folder.exists()


def test_a_gpu_that_was_found_is_refused_too() -> None:
    """`--device auto` where there is one."""
    request = replace(request_of("--scenario", "throughput"), device="cuda")
    with pytest.raises(UsageError, match="measures streams on a CPU: give --device cpu"):
        sweep.expand(request)
    sweep.expand(replace(request, scenario="latency"))


def test_flags_become_cases_with_a_load() -> None:
    def cases(*flags: str) -> list[Case]:
        request = request_of("-m", "cifar_resnet20", "-b", "1", "--backend", "fused", *flags)
        return sweep.expand(replace(request, device="cpu"))

    (case,) = cases("--scenario", "server", "--qps", "max", "--latency-bound", "12.5")
    assert (case.scenario, case.qps, case.latency_bound_ms) == ("server", 0.0, 12.5)
    assert case.label().endswith("server, most queries/s with p99 under 12.5 ms")
    (case,) = cases("--scenario", "server", "--qps", "80")
    assert (case.scenario, case.qps) == ("server", 80.0)
    assert case.identity()["baseline"] == ""  # there is none beside it
    (case,) = cases("--scenario", "throughput", "--threads", "1")
    assert case.label().endswith("throughput")
    assert case.identity()["baseline"] == "eager contiguous"
    (case,) = cases()
    assert case.identity()["scenario"] == "latency" and "latency" not in case.label()
    (case,) = cases("--bench", "train")
    assert case.identity()["scenario"] == ""


def test_a_load_is_part_of_what_identifies_a_case(tmp_path: Path) -> None:
    assert len({results.identity_key(case) for case in LOADS}) == len(LOADS)
    for done, case in enumerate(LOADS):
        assert not results.settled_cases(tmp_path, STAMP.env_id, STAMP.commit) & {
            results.identity_key(other) for other in LOADS[done:]
        }
        add(tmp_path, case)
    settled = results.settled_cases(tmp_path, STAMP.env_id, STAMP.commit)
    assert settled == {results.identity_key(case) for case in LOADS}


def test_rows_of_before_are_of_scenario_latency(tmp_path: Path) -> None:
    train = replace(CASE, mode="train")
    for case in (CASE, train):
        add(tmp_path, case)
    path = tmp_path / results.ROWS
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.drop(columns=[*LOAD, "streams", "queries", "qps", "arrival_seed"]).to_csv(
        path, index=False
    )
    assert list(results.read_rows(tmp_path).scenario) == ["latency", ""]
    settled = results.settled_cases(tmp_path, STAMP.env_id, STAMP.commit)
    assert settled == {results.identity_key(case) for case in (CASE, train)}
    add(tmp_path, THROUGHPUT)
    assert list(results.read_rows(tmp_path).scenario) == ["latency", "", "throughput"]


def test_pages_never_mix_scenarios(tmp_path: Path) -> None:
    """Tables, ratios and counts of latency are what they are without the others."""
    plain, both = tmp_path / "plain", tmp_path / "both"
    for folder in (plain, both):
        for name in ("eager", "fused", "onnxrt"):
            add(folder, replace(CASE, backend=name), rate=40.0)
    for case in LOADS[1:]:
        for name in ("eager", "fused", "onnxrt"):
            add(both, replace(case, backend=name), rate=9876.5, speedup=7.77, speedup_ci_low=7.7,
                speedup_ci_high=7.8, streams=2,
                p99_ms=33.3, qps=77.0, queries=662)  # fmt: skip
    add_failed(
        both, replace(SERVER, backend="openvino"), "fail_to_run", "it cannot keep up with 50"
    )
    (before,), (after,) = read_folders([plain]), read_folders([both])
    assert [replace(n, lines=()) for n in networks(before)] == [
        replace(n, lines=()) for n in networks(after)
    ]
    assert [[line.ratios for line in n.lines] for n in networks(before)] == [
        [line.ratios for line in n.lines] for n in networks(after)
    ]
    assert [len(one.results) for one in after.served] == [3, 4, 3, 3, 3]
    with_ours = write_report(both).read_text()
    without = write_report(plain).read_text()
    (table,) = [part for part in without.split("\n### ") if part.startswith("resnet18, 224 px")]
    assert table.split("\n## ")[0].strip() in with_ours
    for text in (with_ours, text_of(both)):
        sections = {part.splitlines()[0]: part for part in text.split("\n## ")}
        served = {name: part for name, part in sections.items() if name.startswith(("Thr", "Ser"))}
        for name, part in sections.items():
            assert ("7.77" in part or "9876" in part or "33.3" in part) <= (name in served), name
        assert "7.77" in served["Throughput, float32 (ieee arithmetic)"]
        at_50 = served["Server, 50 queries/s, float32 (ieee arithmetic)"]
        assert "7.77" not in at_50  # a ratio to a baseline that was not beside it
        assert "33.3" in at_50 and "it cannot keep up with 50" in at_50
        assert len(text.splitlines()) <= 150 or text is not with_ours
    assert "16 rows of the scenarios throughput and server in tables of their own" in text_of(both)


def test_a_page_of_nothing_but_streams(tmp_path: Path) -> None:
    add(tmp_path, THROUGHPUT)
    text = write_report(tmp_path).read_text()
    assert "1 model (resnet18) under the scenarios throughput and server: 1 of 1 case" in text
    assert "## Throughput, float32" in text
    assert "No case was measured" not in text


def test_compare_does_not_pair_scenarios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = replace(CASE, backend="fused")
    for name, case in (("a", fused), ("b", replace(fused, scenario="throughput"))):
        for run in range(3):
            add(tmp_path / name, case, speedup=1.3 + run / 100)
    code = main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    said = capsys.readouterr()
    assert code == 2
    assert "scenario latency against throughput" in said.out + said.err


def served(**metrics: float | None) -> Outcome:
    found = {"infer_samples_per_sec": 50.0, "speedup": None, "speedup_ci_low": None,
             "speedup_ci_high": None, "qps": 50.0, "p50_ms": 11.0, "p90_ms": 14.0,
             "p99_ms": 21.5, "other_load": 0.0}  # fmt: skip
    return Outcome("pass", "", found | metrics)


def test_the_screen_has_a_line_and_a_table_for_each_load() -> None:
    paired = {"speedup": 1.5, "speedup_ci_low": 1.4, "speedup_ci_high": 1.6}
    fused = {"backend": "fused", "memory_format": "channels_last"}
    measured = [
        (CASE, served(**paired)),
        (THROUGHPUT, served(**paired)),
        (SERVER, served()),
        (replace(SERVER, **fused), served(p99_ms=9.0)),
        (MOST, served(qps=83.25)),
    ]
    assert line(SERVER, served(), None).endswith("50 queries/s p50 11, p90 14, p99 21.5 ms")
    assert "83.25 queries/s, p50 11" in line(MOST, served(qps=83.25), None)
    apart = conclusion.by_load(measured)
    assert [len(one) for one in apart] == [1, 1, 2, 1]
    shown = []
    for one in apart:
        title, (table,) = conclusion.short_tables(one)
        console = Console(width=100, file=io.StringIO(), record=True)
        console.print(table)
        shown.append((title, [text.split() for text in console.export_text().splitlines()][2:]))
    assert shown == [
        ("Times faster than eager (±: half of the 95 % interval)", [["eager", "1.00", "±0.10"]]),
        (
            "Throughput, times that of eager (±: half of the 95 % interval)",
            [["eager", "1.00", "±0.10"]],
        ),
        (
            "Server, 50 queries/s: ms from arrival to answer, p50 / p90 / p99",
            [
                ["fused", "channels_last", "11", "/", "14", "/", "9"],
                ["eager", "11", "/", "14", "/", "21.5"],
            ],
        ),
        ("Server, most queries/s with p99 under 15 ms", [["eager", "83.25"]]),
    ]


def test_the_plan_shows_the_load_and_guesses_longer() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(cases_table(LOADS, 0))
    text = console.export_text()
    assert "scenario" in text and "server, 60 queries/s" in text
    console.print(cases_table([CASE], 0))
    assert "scenario" not in console.export_text()
    guesses = [expected_s(case, 1.0, 1.0, False) for case in (CASE, THROUGHPUT, SERVER)]
    assert guesses == sorted(guesses)
    assert guesses[2] - guesses[0] == pytest.approx(662 / 50 - 1)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_rows_through_a_process_of_their_own_resume_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["bench", "-m", "cifar_resnet20", "-b", "1", "--backend", "fused", "--seconds", "0.2",
              "--threads", "2", "--results", str(tmp_path), "--device", "cpu"]  # fmt: skip
    loads = (
        ["--scenario", "throughput"],
        ["--scenario", "server", "--qps", "25", "--seed", "5"],
    )
    for flags in loads:
        assert main([*common, *flags]) == 0
    (home,) = tmp_path.iterdir()
    throughput, server = results.read_rows(home).to_dict("records")
    assert throughput["status"] == "pass", throughput["error"]
    assert throughput["streams"] == min(2, usable())
    assert throughput["speedup_ci_low"] <= throughput["speedup"] <= throughput["speedup_ci_high"]
    assert throughput["p50_ms"] <= throughput["p90_ms"] <= throughput["p99_ms"]
    assert (server["status"], server["qps"], server["arrival_seed"]) == ("pass", 25, 5), server
    assert server["queries"] == 662 and server["requested_qps"] == "25"
    assert pd.isna(server["speedup"]) and server["baseline"] == ""
    capsys.readouterr()
    for flags in loads:
        assert main([*common, *flags, "--resume", "--dry-run"]) == 0
        assert "0 cases, 1 already settled" in capsys.readouterr().out
    assert main([*common, "--resume", "--dry-run"]) == 0
    assert "1 cases" in capsys.readouterr().out


def test_a_case_goes_to_the_process_of_its_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_task(task: str, *rest: object) -> Outcome:
        asked.append(task.rpartition(":")[2])
        return Outcome("unavailable", "planted")

    monkeypatch.setattr(subprocess_runner, "run_task", run_task)
    for case in (CASE, THROUGHPUT, SERVER):
        subprocess_runner.run_case(case, Options(), {})
    assert asked == ["measure_task", "measure_task", "measure_server_task"]


@pytest.mark.parametrize(
    ("case", "metrics", "said"),
    [
        (CASE, {"speedup": 1.5}, "batch 8 40.0 images/s 1.50x"),
        (THROUGHPUT, {"speedup": 1.5}, "batch 8 throughput 40.0 images/s 1.50x"),
        (SERVER, {"p99_ms": 21.5}, "batch 8 server, 50 queries/s 40.0 images/s p99 21.5 ms"),
    ],
)
def test_the_line_of_a_job_on_a_cluster(
    case: Case, metrics: dict[str, float], said: str, tmp_path: Path
) -> None:
    found = Outcome("pass", "", {"infer_samples_per_sec": 40.0, **metrics})
    results.append_row(tmp_path, CASES.record(case.identity(), found, STAMP))
    (row,) = results.read_cells(tmp_path).to_dict("records")
    line = sweep_command._line({str(name): cell for name, cell in row.items()})
    assert " ".join(line.split()).endswith(said)
