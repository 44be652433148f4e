"""The degradation study: its trainings, its rows, and what the report makes of them."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from report_rows import details
from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.records import results
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.report.data.experiments import experiments, read_training_rows
from resfuse.bench.report.plots.plot_degradation import errors, gradients
from resfuse.bench.report.sections.degradation_section import verdicts
from resfuse.bench.studies import training_session
from resfuse.bench.studies.degradation_runs import plan
from resfuse.bench.trainings import data, recipe, training_row
from resfuse.bench.trainings.degradation_sheet import ASKED, SHEET
from resfuse.bench.trainings.training_run import PLAIN, Run
from trainings import FOUND, QUIET, keep

pytestmark = pytest.mark.slow

RUN = Run("digits", "A", 8, seed=0, epochs=2, batch_size=64, learning_rate=0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "--epochs: 0; accepted: whole numbers from 1"),
        (["--epochs", "some"], "--epochs: 'some' is not a whole number"),
        (["--seeds", "0"], "--seeds: 0; accepted: whole numbers from 1"),
        (["--jobs", "-1"], "--jobs: -1; accepted: whole numbers from 1"),
        (["--depths", "20,21"], "--depths: depth is 21; accepted: 6n + 2, n >= 1"),
        (["--depths", "deep"], "--depths: 'deep' is not a whole number"),
        (["--shortcuts", "A,D"], "--shortcuts: unknown name 'D'; known: A, B, C"),
        (["--timeout", "0"], "--timeout: '0'; accepted: numbers above 0"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "degradation", "--results", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfuse: error: ") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "r").exists()


# Going through the trainings


def test_the_first_seed_of_everything_comes_first() -> None:
    runs = plan("digits", [14, 8], ["A", "C"], seeds=2, epochs=None)
    assert [(r.seed, r.model) for r in runs[:4]] == [
        (0, "cifar_plain8"), (0, "cifar_resnet8"), (0, "cifar_resnet8_c"), (0, "cifar_plain14"),
    ]  # fmt: skip
    assert len(runs) == len(set(runs)) == 12
    assert runs[0].epochs == 30


def test_a_resumed_study_ends_with_the_rows_of_an_uninterrupted_one(
    few: data.Data, one_thread: None, tmp_path: Path
) -> None:
    runs = plan("digits", [8], ["A", "B"], seeds=2, epochs=1)

    def trainer(one: Run, heard: Callable[[dict[str, Any]], None]) -> Outcome:
        done = recipe.train(one, few, "cpu", lambda share: heard({"share": share}))
        return Outcome("pass", "", training_row.metrics(done, few))

    def interrupted(one: Run, heard: Callable[[dict[str, Any]], None]) -> Outcome:
        if one == runs[3]:
            raise KeyboardInterrupt
        return trainer(one, heard)

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    training_session.train_all(runs, trainer, 1, whole, FOUND, SHEET, QUIET)
    with pytest.raises(KeyboardInterrupt):
        training_session.train_all(runs, interrupted, 1, halves, FOUND, SHEET, QUIET)
    assert len(results.read_rows(halves, SHEET)) == 3
    rest = training_session.unsettled(runs, halves, FOUND, SHEET)
    assert rest == runs[3:]
    # In another order, as they may end; one at a time, for these share a process and its generator.
    training_session.train_all(rest[::-1], trainer, 1, halves, FOUND, SHEET, QUIET)
    assert training_session.unsettled(runs, halves, FOUND, SHEET) == []
    one, other = (
        results.read_rows(folder, SHEET)
        .drop(columns="timestamp")
        .sort_values(list(ASKED))
        .reset_index(drop=True)
        for folder in (whole, halves)
    )
    pd.testing.assert_frame_equal(one, other)


def test_a_folder_that_fails_ends_the_trainings_under_way(tmp_path: Path) -> None:
    """The first row cannot be written: what has begun is told to end, the others never begin."""
    runs = plan("digits", [8], ["A"], seeds=4, epochs=1)
    folder = tmp_path / "results"
    folder.write_text("a file, not a folder")
    begun: list[Run] = []
    ended: list[Run] = []

    def trainer(one: Run, heard: Callable[[dict[str, Any]], None]) -> Outcome:
        begun.append(one)
        try:
            while one != runs[0]:
                heard({"share": 0.5})
                time.sleep(0.01)
        except KeyboardInterrupt:
            ended.append(one)
            raise
        return Outcome("timeout", "not done after 3 s")

    with pytest.raises(UsageError, match="cannot be written"):
        training_session.train_all(runs, trainer, 2, folder, FOUND, SHEET, QUIET)
    assert set(ended) == set(begun) - {runs[0]}
    assert len(begun) < len(runs)


def test_a_failed_training_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    runs = plan("digits", [8], ["A"], seeds=1, epochs=1)
    hung = Outcome("timeout", "not done after 3 s")
    counts = training_session.train_all(
        runs, lambda one, heard: hung, 2, tmp_path, FOUND, SHEET, QUIET
    )
    assert counts == {"timeout": 2}
    assert training_session.unsettled(runs, tmp_path, FOUND, SHEET) == runs
    results.record_environment(tmp_path, FOUND["env_id"], FOUND["facts"])
    page = details(tmp_path)
    assert "cifar_plain8, seed 0: timeout, not done after 3 s" in page


@pytest.mark.usefixtures("forked_workers")
def test_the_command_trains_and_resumes(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """For real, in subprocesses: as in this process, and only once."""
    arguments = ["study", "degradation", "--device", "cpu", "--depths", "8", "--epochs", "1",
                 "--seeds", "1", "--jobs", "1", "--results", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    assert main([*arguments, "--resume", "--dry-run"]) == 0
    assert "0 trainings, 2 already settled" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    rows = results.read_rows(folder, SHEET).set_index("model")
    (plain, _) = plan("digits", [8], ["A"], seeds=1, epochs=1)
    done = recipe.train(plain, data.load("digits"), "cpu")
    assert rows.train_loss["cifar_plain8"] == pytest.approx(done.train_loss, rel=1e-12)
    assert rows.gradient_norm_by_layer["cifar_plain8"] == training_row.joined(done.gradient_norms)
    assert {path.name for path in folder.glob("details/*.png")} == {
        f"degradation-{name}-digits.png" for name in ("errors", "curves", "gradients")
    }
    page = (folder / "DETAILS.md").read_text()
    assert "## Degradation: scikit-learn's digits (8x8 pixels), 1 epoch" in page


# The report


def add(folder: Path, run: Run, train: float, test: float = 10.0) -> None:
    found = {
        "param_count": 0.27, "train_images": 1437, "test_images": 360, "train_error_pct": train,
        "test_error_pct": test, "train_loss": train / 50,
        "train_error_by_epoch_pct": training_row.joined([90, train]),
        "test_error_by_epoch_pct": training_row.joined([90, test]),
        "gradient_norm_by_layer": training_row.joined([1.0] * run.depth),
    }  # fmt: skip
    keep(folder, run, Outcome("pass", "", found), SHEET)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Plain networks that get worse from 20 to 56 layers, residual ones that do not; 3 seeds."""
    for seed in range(3):
        for shortcut, depth, error in ((PLAIN, 20, 1), (PLAIN, 56, 60), ("A", 20, 1), ("A", 56, 1)):
            add(tmp_path, replace(RUN, shortcut=shortcut, depth=depth, seed=seed), error + seed / 4)
    return tmp_path


def test_verdicts_follow_the_intervals(study: Path) -> None:
    (experiment,) = experiments(read_training_rows(study, SHEET)[FOUND["env_id"]])
    assert verdicts(experiment) == [
        "Plain: training error rises from 20 to 56 layers: 1.25 [0.63, 1.87] and "
        "60.25 [59.63, 60.87] %.",
        "Residual A (zeros): no difference in training error shows from 20 to 56 layers: "
        "1.25 [0.63, 1.87] and 1.25 [0.63, 1.87] %.",
        "Residual A (zeros): training error below the plain network's at 56 layers and not to be "
        "told from it at 20 layers.",
    ]


def test_one_seed_tells_no_difference(tmp_path: Path) -> None:
    for depth, error in ((20, 1.0), (56, 60.0)):
        add(tmp_path, replace(RUN, shortcut=PLAIN, depth=depth), error)
    (experiment,) = experiments(read_training_rows(tmp_path, SHEET)[FOUND["env_id"]])
    assert "one seed cannot tell whether" in verdicts(experiment)[0]
    assert "60.00 (one seed)" in details(tmp_path)


def test_the_latest_row_of_a_training_stands(study: Path) -> None:
    add(study, replace(RUN, shortcut="A", depth=56, seed=2), 31.5)
    (experiment,) = experiments(read_training_rows(study, SHEET)[FOUND["env_id"]])
    assert len(experiment.finished) == 12
    assert [t.numbers["train_error_pct"] for t in experiment.of("A", 56)] == [1, 1.25, 31.5]


def test_experiments_of_another_length_stand_apart(study: Path) -> None:
    add(study, replace(RUN, epochs=9), 5.0)
    found = experiments(read_training_rows(study, SHEET)[FOUND["env_id"]])
    assert [(e.epochs, len(e.finished)) for e in found] == [(2, 12), (9, 1)]
    page = details(study)
    assert len(re.findall(r"^## Degradation", page, re.MULTILINE)) == 2
    assert len(list(study.glob("details/degradation-*.png"))) == 6


def test_plots_show_the_means_and_every_layer(study: Path) -> None:
    (experiment,) = experiments(read_training_rows(study, SHEET)[FOUND["env_id"]])
    drawn = errors(experiment)
    assert drawn is not None
    lines = [np.asarray(line.get_ydata()) for line in drawn.axes[0].get_lines()]
    assert any(line.tolist() == pytest.approx([1.25, 60.25]) for line in lines)
    norms = gradients(experiment)
    assert norms is not None
    assert sorted(len(np.asarray(li.get_ydata())) for li in norms.axes[0].get_lines()) == [20, 56]
