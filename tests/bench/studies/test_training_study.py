"""The training study: its ways, its rows, and what the report makes of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import triton
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from conftest import ROOT
from report_rows import details
from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.records import results
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.report.data.agreement import agreement, apart, change, is_equal, seeds_apart
from resfuse.bench.report.data.experiments import Experiment, experiments, read_training_rows
from resfuse.bench.report.plots.plot_agreement import curves
from resfuse.bench.report.sections.agreement_section import verdicts
from resfuse.bench.studies import training_session
from resfuse.bench.studies.training_study import runs_on
from resfuse.bench.trainings import data, recipe, training_row
from resfuse.bench.trainings.degradation_sheet import SHEET as DEGRADATION
from resfuse.bench.trainings.training_run import Run, build, runs_of
from resfuse.bench.trainings.training_sheet import SHEET
from resfuse.bench.trainings.variants import EAGER, EXACT, FUSED, TWINS, WAYS, run_as
from resfuse.kernels.gpu.batch_norm import bn_add_relu
from trainings import FOUND, QUIET, keep

pytestmark = pytest.mark.slow

RUN = Run("digits", "A", 8, seed=0, epochs=1, batch_size=48, learning_rate=0.02)


@pytest.fixture(autouse=True)
def as_without_tests(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """No interpreter, which conftest.py asks Triton for."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def operations(model: nn.Module, images: Tensor) -> dict[str, int]:
    """How often a training step calls which of our operations."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(images).sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    return {
        name.removeprefix("resfuse::"): count
        for name, count in counts.items()
        if name.startswith("resfuse::")
    }


# The ways


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_only_the_twins_run_the_fused_operations(shortcut: str) -> None:
    """Seven norms, and those of the two projections that B adds, which the joins take in. Their
    statistics come from the convolutions."""
    projections = 2 * (shortcut == "B")
    found = {}
    for way in WAYS:
        model, images = build(replace(RUN, shortcut=shortcut)), torch.randn(4, 3, 8, 8)
        dtype = getattr(torch, WAYS[way].dtype)
        with run_as(way, model.train()):
            found[way] = operations(model, images.to(dtype))
    assert found[EXACT] == found[EAGER] == found[FUSED] == {}
    assert found[TWINS] == {
        "conv_statistics": 7 + projections, "bn_merge": 7 + projections, "bn_add_relu": 7,
        "bn_add_relu_backward": 7,
    }  # fmt: skip


def test_on_a_cpu_fused_trains_as_eager_does_to_the_bit(few: data.Data) -> None:
    eager, fused = (recipe.train(replace(RUN, way=way), few, "cpu") for way in (EAGER, FUSED))
    assert eager.first_losses == fused.first_losses
    assert eager.train_losses == fused.train_losses
    # tested with folded weights, made anew after each epoch
    assert eager.test_losses == pytest.approx(fused.test_losses, rel=1e-5)


def test_twins_train_by_other_bits_and_no_further_from_float64(few: data.Data) -> None:
    exact, eager, twins = (
        np.array(recipe.train(replace(RUN, way=way), few, "cpu").first_losses)
        for way in (EXACT, EAGER, TWINS)
    )
    assert len(exact) == 4  # steps
    assert not np.array_equal(eager, twins)
    assert np.abs(twins - exact).max() < 10 * np.abs(eager - exact).max() < 1e-3


def test_a_wrong_backward_formula_changes_the_curve_of_the_twins_alone(
    few: data.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient's mean is not subtracted, by a part in a hundred of it."""
    ways = (EAGER, FUSED, TWINS)
    right = {way: recipe.train(replace(RUN, way=way), few, "cpu") for way in ways}
    formula = bn_add_relu._backward_ref

    def wrong(grad: Any, y: Any, main: Any, *rest: Any) -> Any:
        grad_x, added, grads = formula(grad, y, main, *rest)
        offset = 0.01 * (grads[0] * main.rstd / (grad.numel() // grad.shape[1]))
        return grad_x + offset[:, None, None], added, grads

    monkeypatch.setattr(bn_add_relu, "_backward_ref", wrong)
    planted = {way: recipe.train(replace(RUN, way=way), few, "cpu") for way in ways}
    assert planted[EAGER] == right[EAGER] and planted[FUSED] == right[FUSED]
    one, other = planted[TWINS].first_losses, right[TWINS].first_losses
    assert one[0] == other[0]  # the first step has no backward pass behind it
    # The right one's distance from eager, which is rounding, is far below.
    rounding = abs(right[EAGER].first_losses[1] - other[1])
    assert abs(one[1] - other[1]) > 100 * rounding


def test_the_twins_refuse_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    said = "environment variable TRITON_INTERPRET: .*accepted for twins: unset"
    with pytest.raises(UsageError, match=said), run_as(TWINS, build(RUN)):
        pass


def test_a_gpu_has_no_twins_but_for_a_refusal() -> None:
    runs = runs_of("digits", [8], ["A"], 1, None, list(WAYS))
    assert [one.way for one in runs_on("cpu", runs, [])] == list(WAYS)
    assert [one.way for one in runs_on("cuda", runs, [])] == [EXACT, EAGER, FUSED]
    with pytest.raises(UsageError, match="--ways: twins on cuda:1, where fused runs the kernels"):
        runs_on("cuda:1", runs, [TWINS])


# Going through the trainings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ways", "eager,fussed"], "--ways: unknown name 'fussed'; did you mean fused?"),
        (["--seeds", "0"], "--seeds: 0; accepted: whole numbers from 1"),
        (["--depths", "21"], "--depths: depth is 21; accepted: 6n + 2, n >= 1"),
        (["--shortcuts", "D"], "--shortcuts: unknown name 'D'; known: A, B, C"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "training", "--results", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfuse: error: ") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "r").exists()


def test_ways_of_one_seed_are_trainings_of_their_own(few: data.Data, tmp_path: Path) -> None:
    """What was interrupted goes on where it was; degradation.csv has nothing to do with it."""
    runs = runs_of("digits", [8], ["A"], 1, 1, [EAGER, TWINS])

    def trainer(one: Run, heard: Callable[[dict[str, Any]], None]) -> Outcome:
        return Outcome("pass", "", training_row.metrics(recipe.train(one, few, "cpu"), few))

    training_session.train_all(runs[:1], trainer, 1, tmp_path, FOUND, SHEET, QUIET)
    assert training_session.unsettled(runs, tmp_path, FOUND, SHEET) == runs[1:]
    assert training_session.unsettled(runs, tmp_path, FOUND, DEGRADATION) == runs
    training_session.train_all(runs[1:], trainer, 1, tmp_path, FOUND, SHEET, QUIET)
    assert training_session.unsettled(runs, tmp_path, FOUND, SHEET) == []
    rows = results.read_rows(tmp_path, SHEET).set_index("way")
    done = recipe.train(runs[1], few, "cpu")
    kept = [float(number) for number in rows.loss_by_step[TWINS].split()]
    assert [np.float32(number) for number in kept] == [np.float32(n) for n in done.first_losses]
    assert rows.test_loss[TWINS] == pytest.approx(done.test_losses[-1], rel=1e-12)
    assert rows.index.tolist() == [EAGER, TWINS]


@pytest.mark.usefixtures("forked_workers")
def test_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For real, in subprocesses."""
    arguments = ["study", "training", "--device", "cpu", "--depths", "8", "--epochs", "1",
                 "--seeds", "1", "--jobs", "1", "--ways", "eager,twins",
                 "--results", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    assert main([*arguments, "--resume", "--dry-run"]) == 0
    assert "0 trainings, 2 already settled" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert results.read_rows(folder, SHEET).way.tolist() == [EAGER, TWINS]
    assert [path.name for path in folder.glob("details/*.png")] == ["training-curves-digits.png"]
    page = (folder / "DETAILS.md").read_text()
    assert "## Training fused and unfused: cifar_resnet8 on scikit-learn's digits" in page
    assert "twins: one seed has no spread to compare with." in page
    assert main(["report", "--results", str(tmp_path)]) == 0  # a folder of nothing else


# The report


def add(folder: Path, way: str, seed: int, losses: list[float], test_error: float = 2.0) -> None:
    found = {
        "param_count": 0.27,
        "train_images": 96,
        "test_images": 360,
        "train_error_pct": 1.0,
        "test_error_pct": test_error,
        "train_loss": losses[-1],
        "test_loss": losses[-1],
        "train_error_by_epoch_pct": training_row.joined([50.0, 1.0]),
        "test_error_by_epoch_pct": training_row.joined([50.0, test_error]),
        "train_loss_by_epoch": training_row.joined(losses),
        "test_loss_by_epoch": training_row.joined(losses),
        "loss_by_step": training_row.joined([2.0, *losses], training_row.EXACT_DIGITS),
    }
    run = replace(RUN, seed=seed, epochs=len(losses), way=way)
    keep(folder, run, Outcome("pass", "", found), SHEET)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three seeds. `fused` is eager; the twins are further from it than seeds are."""
    for seed, start in enumerate((1.0, 1.2, 1.4)):
        add(tmp_path, EXACT, seed, [start + 0.001, 0.5 + seed / 10])
        add(tmp_path, EAGER, seed, [start, 0.5 + seed / 10])
        add(tmp_path, FUSED, seed, [start, 0.5 + seed / 10])
        add(tmp_path, TWINS, seed, [start + 0.1, 0.9], test_error=5.0 + seed / 10)
    return tmp_path


def experiment_of(folder: Path) -> Experiment:
    (experiment,) = experiments(read_training_rows(folder, SHEET)[FOUND["env_id"]])
    return experiment


def test_differences_are_those_at_the_same_seed(study: Path) -> None:
    experiment = experiment_of(study)
    twins = agreement(experiment, TWINS)
    assert twins is not None
    assert (twins.at, twins.largest, twins.spread) == (2, pytest.approx(0.4), pytest.approx(0.2))
    starts, ends = np.array([1.0, 1.2, 1.4]), np.array([0.5, 0.6, 0.7])
    away = np.log([(starts + 0.1) / starts, 0.9 / ends])
    assert twins.distance == pytest.approx(np.sqrt(np.square(away).mean()))
    between = [np.log(c[i] / c[j]) for c in (starts, ends) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert twins.between_seeds == pytest.approx(np.sqrt(np.square(between).mean()))
    assert twins.quotient.mean == pytest.approx(np.exp(away.mean()))
    assert twins.share > 1
    assert is_equal(experiment, FUSED) and not is_equal(experiment, TWINS)
    assert apart(experiment, EAGER, EXACT) == pytest.approx([0, 0.001, 0])
    pairs = np.sqrt(np.mean(np.square([0.2, 0.2, 0.4])))
    assert seeds_apart(experiment, EAGER) == pytest.approx([0, pairs, pairs / 2])
    more = change(experiment, TWINS, "test_error_pct")
    assert more is not None and more.low is not None
    assert (more.mean, more.low) == pytest.approx((3.1, 3.1 - 4.3027 * 0.1 / 3**0.5), abs=1e-4)


def test_verdicts_follow_the_curves(study: Path) -> None:
    fused, twins = verdicts(experiment_of(study))
    assert fused == (
        "fused: every loss while training is eager's, to the last digit kept. Test error at the "
        "same seed: +0.00 [+0.00, +0.00] points: no difference shows."
    )
    assert "1.32 times as far from eager's as two seeds of eager are from each other" in twins
    assert "the curves do not agree within the spread of seeds" in twins
    assert "of eager's in training (a difference) and 1.28 [" in twins
    assert "of eager's in testing (a difference)." in twins
    assert "+3.10 [+2.85, +3.35] points: a difference" in twins
    page = details(study)
    assert f"- {fused}" in page and f"- {twins}" in page
    assert "twins runs the fused operations" in page


def test_a_seed_that_one_way_lacks_is_left_out(study: Path) -> None:
    add(study, EAGER, 7, [90.0, 80.0])
    add(study, FUSED, 8, [1.0, 0.5])
    found = agreement(experiment_of(study), FUSED)
    assert found is not None
    assert (found.quotient.seeds, found.largest, found.share) == (3, 0, 0)


def test_the_plot_has_each_ways_mean_and_band(study: Path) -> None:
    figure = curves(experiment_of(study))
    assert figure is not None
    training, testing, parting = figure.axes
    means = [np.asarray(line.get_ydata()) for line in training.get_lines()]
    for mean in ([1.201, 0.6], [1.2, 0.6], [1.3, 0.9]):
        assert any(line.tolist() == pytest.approx(mean) for line in means)
    assert len(training.collections) == len(testing.collections) == 4
    assert len(parting.get_lines()) == 4  # three ways beside float64, and the seeds
    assert all(ax.get_xlabel() for ax in figure.axes)
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "linear", "log"]


def test_losses_of_several_magnitudes_are_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    add(tmp_path, EAGER, 0, [2.0, 0.02])
    figure = curves(experiment_of(tmp_path))
    assert figure is not None
    assert figure.axes[0].get_yscale() == "log"


def test_networks_stand_apart_and_other_sheets_too(study: Path) -> None:
    other = replace(RUN, depth=14, epochs=2)
    hung = Outcome("timeout", "not done after 3 s")
    for way in (EAGER, TWINS):
        keep(study, replace(other, way=way), hung, SHEET)
    keep(study, other, hung, DEGRADATION)
    page = details(study)
    assert page.count("## Training fused and unfused: ") == 2
    assert page.count("## Degradation: ") == 1
    assert "cifar_resnet14, twins, seed 0: timeout, not done after 3 s" in page


@pytest.mark.parametrize("column", ["way", "shortcut"])
def test_a_row_of_something_unknown_is_a_sentence(column: str, tmp_path: Path) -> None:
    published = next(iter((ROOT / "results").rglob(SHEET.file)))
    rows = pd.read_csv(published, dtype=str, keep_default_na=False)
    rows.loc[0, column] = "sideways"
    rows.to_csv(tmp_path / SHEET.file, index=False)
    with pytest.raises(UsageError, match=f"{SHEET.file}: column {column}: 'sideways'; accepted: "):
        read_training_rows(tmp_path, SHEET)
