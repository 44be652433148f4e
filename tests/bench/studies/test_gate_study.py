"""`resfuse study gate`, with few runs: it plants what it says, and judges as the command does."""

import argparse
import math
import random
from pathlib import Path

import pandas as pd
import pytest
import torch

from resfuse.bench.backends import BACKENDS, eager
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.subprocess_runner import run_case
from resfuse.bench.studies import gate_study
from resfuse.bench.studies import slowed_backend as slowed
from resfuse.bench.studies.harness_sheet import HARNESS, append
from resfuse.resnet_ref import create


def test_sides_are_neighbours_in_time() -> None:
    runs = {"equal": [0, 2, 3, 5, 6, 8, 9], "slowed": [1, 4, 7]}
    assert list(gate_study.equal_sides(runs)) == [([0, 2, 3], [5, 6, 8]), ([2, 3, 5], [6, 8, 9])]
    runs = {"equal": [0, 1, 2, 4, 6, 8, 9, 11], "slowed": [3, 5, 7, 10]}
    assert list(gate_study.slowed_sides(runs)) == [
        ([0, 1, 2], [3, 5, 7]),
        ([8, 9, 11], [3, 5, 7]),
        ([1, 2, 4], [5, 7, 10]),  # after these there is one equal run alone
    ]


def test_the_slowed_network_gives_the_same_answer() -> None:
    """It works on a tenth more images, whose answers are dropped."""
    model, images = create("cifar_resnet20").eval(), torch.randn(20, 3, 32, 32)
    worked_on: list[int] = []
    model.conv1.register_forward_hook(lambda layer, given, y: worked_on.append(len(y)))
    answer = slowed.build(model, images)(images)
    assert worked_on == [22]
    torch.testing.assert_close(answer, eager.build(model, images)(images))
    with pytest.raises(ValueError, match="a tenth of 4 images is no whole number"):
        slowed.build(model, images[:4])


def test_a_run_is_a_process_of_its_own_with_the_planted_backend() -> None:
    case = Case("cifar_resnet20", "subject", "inference", "cpu", "float32", "contiguous", 10, 32)
    options = Options(seconds=0.2, timeout_s=200)
    outcome = run_case(case, options, {}, backends={"subject": gate_study.KINDS["slowed"]})
    assert outcome.status == "pass", outcome.error
    assert "subject" not in BACKENDS  # here nothing was planted


@pytest.mark.parametrize(("slowdown", "flagged"), [(0.10, 100), (0.03, 0)])
def test_the_study_counts_what_the_command_would_flag(
    slowdown: float,
    flagged: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs with 1 % of noise and a known slowdown in place of measured ones."""
    rng = random.Random(1)

    def run_case(case: Case, options: Options, ceilings: dict, backends: dict) -> Outcome:
        slowed = backends["subject"] == gate_study.KINDS["slowed"]
        ratio = math.exp(rng.gauss(0, 0.01)) / (1 + slowdown * slowed)
        metrics = {
            "speedup": ratio,
            "speedup_ci_low": 0.99 * ratio,
            "speedup_ci_high": 1.01 * ratio,
        }
        return Outcome("pass", "", metrics)

    monkeypatch.setattr(gate_study, "run_case", run_case)
    assert gate_study.run(argparse.Namespace(results=tmp_path, device="cpu")) == 0
    said = capsys.readouterr().out
    rows = pd.read_csv(next(tmp_path.glob(f"*/{HARNESS.file}"))).set_index("planted_pct")
    assert set(rows.study) == {"gate"} and set(rows.runs) == {84}
    assert list(rows.comparisons) == [51, 50]
    assert rows.flagged_pct[0] == 0
    assert rows.flagged_pct[10] == flagged
    assert rows.ratio[10] == pytest.approx(1 + slowdown, abs=0.01)
    assert "10 % planted: " in said


def test_an_older_file_gains_the_columns(tmp_path: Path) -> None:
    older = ["model", "device", "blocks", "bare_samples_per_sec", "env_id", "commit"]
    home = append(tmp_path, "cpu", [{"study": "gate", "model": "m", "runs": 9}]).parent
    pd.DataFrame([["resnet18", "cpu", 25, 52.9, "e", "c"]], columns=older).to_csv(
        home / HARNESS.file, index=False
    )
    path = append(tmp_path, "cpu", [{"study": "gate", "model": "m", "runs": 9}])
    table = pd.read_csv(path)
    assert tuple(table.columns) == HARNESS.columns
    assert list(table.blocks.fillna(0)) == [25, 0]
    assert list(table.runs.fillna(0)) == [0, 9]
