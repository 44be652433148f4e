"""`resfuse study contention`: what stands in its rows and on its page, and who runs beside it."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from resfuse.bench.cli import main
from resfuse.bench.measuring import correctness
from resfuse.bench.records import results
from resfuse.bench.report.study_pages import CONTENTION, CONTENTION_PICTURE
from resfuse.bench.studies.contention import contention_study, contention_table, subject
from resfuse.bench.studies.contention.neighbours import busy
from resfuse.bench.studies.contention.scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The exit code of a small run, and the folder of its results."""
    folder = tmp_path_factory.mktemp("results")
    code = main(
        ["study", "contention", "-m", "cifar_resnet20", "-b", "2", "--results", str(folder),
         "--backend", "eager,fused,tensorrt", "--baseline", "eager", "--seconds", "0.01",
         "--scenario", "quiet,nice2-pinned,callers2"]
    )  # fmt: skip
    (home,) = folder.iterdir()
    return code, home


def test_a_row_for_each_backend_and_scenario(measured: tuple[int, Path]) -> None:
    code, home = measured
    rows = results.read_rows(home, contention_study.SHEET, only_whole=True)
    assert code == 0
    passed = rows[rows.status == "pass"]
    assert sorted(zip(passed.backend, passed.scenario, strict=True)) == sorted(
        (backend, scenario)
        for backend in ("eager", "fused")
        for scenario in ("quiet", "nice2-pinned", "callers2")
    )
    assert (passed.latency_p50_ms <= passed.latency_p99_ms).all()
    assert (passed.rounds >= contention_study.LEAST_ROUNDS).all()
    assert (passed.runs >= passed.rounds).all()
    assert (passed[passed.scenario == "quiet"].slowdown == 1).all()
    ours = passed[passed.backend == "fused"]
    assert (ours.baseline == "eager").all() and ours.speedup.between(
        ours.speedup_ci_low, ours.speedup_ci_high
    ).all()
    (missing,) = rows[rows.status != "pass"].to_dict("records")
    assert (missing["backend"], missing["status"]) == ("tensorrt", "unavailable")
    assert missing["error"]


def test_the_page_has_every_scenario_and_says_what_could_not_run(
    measured: tuple[int, Path],
) -> None:
    _, home = measured
    text = (home / CONTENTION).read_text()
    for name in ("quiet", "nice2-pinned", "callers2"):
        assert f"| {SCENARIOS[name].title} | eager |" in one_spaced(text)
    assert "- tensorrt: unavailable: " in text
    assert (home / CONTENTION_PICTURE).read_bytes().startswith(b"\x89PNG")


def one_spaced(text: str) -> str:
    """Without what aligns the columns of tables."""
    return re.sub(" +", " ", text)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process stands for a backend's."""
    monkeypatch.setattr(subject, "_inferences", [])
    monkeypatch.setattr(subject, "_threads", [])
    threads = torch.get_num_threads()
    yield
    for thread in subject._threads:
        thread.shutdown()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("alone")
def test_all_callers_are_timed_and_their_rates_add_up() -> None:
    subject.set_up("eager", "cifar_resnet20", 2, 1, 3)
    turn = subject.take_turn(3, 0.2, 2)
    assert len(turn.latencies_ms) >= 3 and min(turn.latencies_ms) > 0
    in_runs = 3 * 2 * 1e3 * len(turn.latencies_ms) / sum(turn.latencies_ms)
    assert 0 < turn.samples_per_sec < 1.5 * in_runs


@pytest.mark.usefixtures("alone")
def test_a_wrong_answer_in_a_turn_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject.set_up("eager", "cifar_resnet20", 2, 1, 2)
    run = subject._inferences[1]._run
    monkeypatch.setattr(subject._inferences[1], "_run", lambda x: run(x) * 1.01)
    with pytest.raises(correctness.WrongAnswer):
        subject.take_turn(2, 0.1, 2)


def test_neighbours_are_busy_while_the_block_runs_and_gone_afterwards() -> None:
    own = psutil.Process().nice()  # a suite that runs at nice 10 has neighbours at 19
    with busy(Scenario(2, 10, pinned=True)):
        neighbours = _neighbours()
        assert len(neighbours) == 2
        for neighbour in neighbours:
            assert neighbour.nice() == min(own + 10, 19)
            assert neighbour.cpu_affinity() == [min(os.sched_getaffinity(0))]
            _wait_until_it_computes(neighbour)
    assert not _neighbours()


def _neighbours() -> list[psutil.Process]:
    """Of this process's children those that were started to be busy: torch's compiler, in the same
    test process, may start and end others at any time."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if busy.__module__ in child.cmdline():
                found.append(child)
    return found


def _wait_until_it_computes(process: psutil.Process) -> None:
    """However little of a processor it is given beside others. Its state at a single moment says
    less: a busy process that waits for a page is not running either."""
    before = process.cpu_times().user
    for _ in range(600):
        if process.cpu_times().user > before + 0.05:
            return
        time.sleep(0.1)
    pytest.fail("a neighbour is idle")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--scenario", "noise"], "argument --scenario: unknown name 'noise'"),
        (["--backend", "eager"], "argument --baseline: openvino is not among --backend"),
        (["-m", "resnet51"], "argument --model: unknown name 'resnet51'"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_bad_arguments_get_a_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["study", "contention", "--results", str(tmp_path), *arguments]))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dead_backend_costs_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention_study.subject, "set_up", _dies_as_fused)
    found = list(
        contention_study._rows("cifar_resnet20", 1, 1, ["fused", "eager"], "eager", ["quiet"], 0.01)
    )
    assert [(row["backend"], row["status"]) for row in found] == [
        ("fused", "fail"),
        ("eager", "pass"),
    ]
    assert found[0]["error"] == "the process died"


def _dies_as_fused(backend: str, *rest: object) -> None:
    if backend == "fused":
        os._exit(3)
    subject.set_up(backend, *rest)  # type: ignore[arg-type]


def test_the_last_row_of_a_measurement_stands() -> None:
    row = {
        "model": "resnet50", "backend": "engine", "batch_size": 1, "threads": 2,
        "scenario": "normal1", "rounds": 5, "runs": 50, "latency_p50_ms": 10.0,
        "latency_p99_ms": 20.0, "samples_per_sec": 99.0, "slowdown": 2.0, "baseline": "openvino",
        "speedup": 1.25, "speedup_ci_low": 1.2, "speedup_ci_high": 1.3, "status": "pass",
        "error": "", "env_id": "e", "commit": "c",
    }  # fmt: skip
    rows = pd.DataFrame([{**row, "speedup": 9.0}, row, {**row, "env_id": "other"}, row])
    text = one_spaced(contention_table.page(contention_table._standing(rows)))
    assert text.count("| engine |") == 1
    assert "| 10.0 | 20.0 | 99.0 | 2.00 | 1.25 [1.20, 1.30] |" in text
