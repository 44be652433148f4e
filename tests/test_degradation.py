"""The degradation study: its images, its recipe, its rows, and what the report makes of them."""

import math
import pickle
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from resfuse.bench import results
from resfuse.bench.cli import main
from resfuse.bench.errors import UsageError
from resfuse.bench.report import write_report
from resfuse.bench.report.degradation_section import verdicts
from resfuse.bench.report.plot_degradation import errors, gradients
from resfuse.bench.report.trainings import experiments, read_training_rows
from resfuse.bench.row import Outcome, Stamp
from resfuse.bench.statistics import mean_interval
from resfuse.bench.studies.degradation.plan import plan
from resfuse.bench.studies.degradation.row import ASKED, SHEET
from resfuse.bench.studies.learning import command, data, recipe, row
from resfuse.bench.studies.learning.run import PLAIN, Run, build

RUN = Run("digits", "A", 8, seed=0, epochs=2, batch_size=64, learning_rate=0.02)
FOUND = {
    "facts": {"device_name": "Xeon 2.9 GHz"}, "env_id": "xeon-torch2.14.1", "commit": "3f2a91c",
    "device": "cpu",
}  # fmt: skip
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def few() -> data.Data:
    """192 of the digits to train on and 100 to test on."""
    every = data.load("digits")
    train = data.Split(every.train.images[:192], every.train.labels[:192])
    return replace(every, train=train, test=data.Split(every.test.images[:100],
                                                       every.test.labels[:100]))  # fmt: skip


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_digits_are_split_once_for_all() -> None:
    one, other = data.load("digits"), data.load("digits")
    assert (len(one.train.labels), len(one.test.labels)) == (1437, 360)
    assert torch.equal(one.train.images, other.train.images)
    assert list(one.train.images.shape[1:]) == [3, 8, 8]
    assert torch.equal(one.train.images[:, 0], one.train.images[:, 2])
    shares = torch.bincount(one.test.labels) / 360 - torch.bincount(one.train.labels) / 1437
    assert shares.abs().max() < 0.003  # each digit has the same share of both


def test_a_seed_gives_the_same_network_to_the_bit(few: data.Data, one_thread: None) -> None:
    first, again = recipe.train(RUN, few, "cpu"), recipe.train(RUN, few, "cpu")
    assert first == again
    assert recipe.train(replace(RUN, seed=1), few, "cpu").train_loss != first.train_loss


def test_training_learns(few: data.Data) -> None:
    done = recipe.train(replace(RUN, epochs=8, batch_size=16), few, "cpu")
    assert done.train_error < 0.3 < done.train_curve[0]
    assert len(done.train_curve) == len(done.test_curve) == 8
    assert done.test_error == done.test_curve[-1]


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_plain_and_residual_differ_in_shortcuts_alone(depth: int) -> None:
    def count(shortcut: str) -> int:
        return sum(
            p.numel() for p in build(replace(RUN, shortcut=shortcut, depth=depth)).parameters()
        )

    blocks = (depth - 2) // 6
    widening = 16 * 32 + 32 * 64 + 2 * (32 + 64)  # two 1x1 projections and their batch norms
    same = sum(blocks * (w * w + 2 * w) for w in (16, 32, 64)) - sum(
        w * w + 2 * w for w in (32, 64)
    )
    assert count(PLAIN) == count("A")
    assert count("B") - count("A") == widening
    assert count("C") - count("A") == widening + same


def test_the_seeds_of_plain_and_residual_networks_draw_the_same_weights() -> None:
    plain, residual = (build(replace(RUN, shortcut=s)).state_dict() for s in (PLAIN, "A"))
    assert plain.keys() == residual.keys()
    assert all(torch.equal(plain[name], residual[name]) for name in plain)


def test_the_schedule() -> None:
    def rates(depth: int, warm: int) -> list[float]:
        run = replace(RUN, depth=depth, epochs=8)
        return [recipe.learning_rate(run, epoch, epoch < warm) for epoch in range(8)]

    assert rates(20, 0) == pytest.approx([2e-2] * 4 + [2e-3] * 2 + [2e-4] * 2)
    assert rates(110, 1) == pytest.approx([2e-3] + [2e-2] * 3 + [2e-3] * 2 + [2e-4] * 2)


def test_shifted_images_are_crops_of_the_framed_image() -> None:
    images = torch.arange(64 * 2 * 4 * 4, dtype=torch.float32).reshape(64, 2, 4, 4) + 1
    generator = torch.Generator().manual_seed(0)
    moved = recipe.shifted(images, 1, True, generator)
    seen = set()
    for image, result in zip(images, moved, strict=True):
        framed = F.pad(image, (1, 1, 1, 1))
        crops = {
            (down, right, mirrored): crop.flip(-1) if mirrored else crop
            for down in range(3)
            for right in range(3)
            for crop in [framed[:, down : down + 4, right : right + 4]]
            for mirrored in (False, True)
        }
        (found,) = [where for where, crop in crops.items() if torch.equal(crop, result)]
        seen.add(found)
    assert len(seen) > 12  # of 18
    assert not torch.equal(recipe.shifted(images, 1, False, generator), images)
    assert torch.equal(recipe.shifted(images, 0, False, generator), images)


def test_gradient_norms_are_those_of_the_layers_and_leave_the_model(few: data.Data) -> None:
    model = build(replace(RUN, shortcut="B"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = recipe.preparation(few, "cpu")(few.train.images[:32])
    norms = recipe.gradient_norms(model, images, few.train.labels[:32])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(norms) == 8  # layers; projections are none
    F.cross_entropy(model(images), few.train.labels[:32]).backward()
    assert model.conv1.weight.grad is not None and model.fc.weight.grad is not None
    assert norms[0] == pytest.approx(float(model.conv1.weight.grad.norm()))
    assert norms[-1] == pytest.approx(float(model.fc.weight.grad.norm()))


def test_gradients_grow_towards_the_input_of_a_deep_plain_network_alone(few: data.Data) -> None:
    images = recipe.preparation(few, "cpu")(few.train.images[:64])

    def growth(shortcut: str) -> float:
        model = build(replace(RUN, shortcut=shortcut, depth=56))
        norms = recipe.gradient_norms(model, images, few.train.labels[:64])
        return norms[0] / norms[-1]

    assert growth(PLAIN) > 20 * growth("A")  # 1e3 against 8, of seed 0


def test_prepared_images_have_no_mean_and_unit_spread(few: data.Data) -> None:
    prepared = recipe.preparation(few, "cpu")(few.train.images)
    assert prepared.mean(0).abs().max() < 1e-5
    assert float(prepared.square().mean()) == pytest.approx(1)


# CIFAR-10's files


def write_cifar(folder: Path, binary: bool) -> None:
    """Three images a batch, the same in both versions."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*data.TRAIN_FILES, data.TEST_FILE):
        pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, 3).astype(np.uint8)
        if binary:
            np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
        else:
            batch = {b"data": pixels, b"labels": labels.tolist(), b"filenames": [b"a.png"] * 3}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_both_versions_of_cifar_read_the_same(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py", binary=False)
    write_cifar(tmp_path / "bin", binary=True)
    python, binary = data.load(str(tmp_path)), data.load(str(tmp_path / "bin"))
    assert list(python.train.images.shape) == [15, 3, 32, 32]
    for one, other in ((python.train, binary.train), (python.test, binary.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert (python.name, python.shift, python.flip) == ("cifar10", 4, True)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return Path.touch, (Path("evil-was-here"),)  # type: ignore[return-value]


def corrupted(folder: Path, how: str) -> Path:
    write_cifar(folder, binary=how == "short")
    victim = folder / "data_batch_3"
    if how == "lacking":
        victim.unlink()
    elif how == "short":
        (folder / "data_batch_3.bin").write_bytes(b"\x01" * 100)
    elif how == "cut":
        victim.write_bytes(victim.read_bytes()[:50])
    elif how == "evil":
        victim.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    elif how == "keys":
        victim.write_bytes(pickle.dumps({b"data": np.zeros((3, 3072), np.uint8)}))
    elif how == "pixels":
        victim.write_bytes(pickle.dumps({b"data": np.zeros((3, 10), np.uint8), b"labels": [0] * 3}))
    elif how == "labels":
        batch = {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1, 10]}
        victim.write_bytes(pickle.dumps(batch))
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "missing":
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "is not a folder; accepted: digits, download, or a folder"),
        ("empty", "holds neither test_batch nor test_batch.bin"),
        ("lacking", "lacks data_batch_3 (or data_batch_3.bin)"),
        ("short", "data_batch_3.bin cannot be read as a batch of CIFAR-10: 100 bytes are no whole"),
        ("cut", "data_batch_3 cannot be read as a batch of CIFAR-10: "),
        ("evil", "which no array of numbers needs"),
        ("keys", "data_batch_3 cannot be read as a batch of CIFAR-10: it has no labels"),
        ("pixels", "its images are uint8 [3, 10], not uint8 [N, 3072]"),
        ("labels", "its labels are not one number from 0 to 9 for each image"),
    ],
)
def test_damaged_data_is_a_sentence(
    how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = corrupted(tmp_path / "data", how)
    arguments = ["--data", str(folder), "--results", str(tmp_path / "r")]
    assert main(["study", "degradation", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfuse: error: argument --data: ") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "evil-was-here").exists()


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
        return Outcome("pass", "", row.metrics(done, few))

    def interrupted(one: Run, heard: Callable[[dict[str, Any]], None]) -> Outcome:
        if one == runs[3]:
            raise KeyboardInterrupt
        return trainer(one, heard)

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    command.train_all(runs, trainer, 1, whole, FOUND, SHEET, QUIET)
    with pytest.raises(KeyboardInterrupt):
        command.train_all(runs, interrupted, 1, halves, FOUND, SHEET, QUIET)
    assert len(results.read_rows(halves, SHEET)) == 3
    rest = command.unsettled(runs, halves, FOUND, SHEET)
    assert rest == runs[3:]
    # In another order, as they may end; one at a time, for these share a process and its generator.
    command.train_all(rest[::-1], trainer, 1, halves, FOUND, SHEET, QUIET)
    assert command.unsettled(runs, halves, FOUND, SHEET) == []
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
        command.train_all(runs, trainer, 2, folder, FOUND, SHEET, QUIET)
    assert set(ended) == set(begun) - {runs[0]}
    assert len(begun) < len(runs)


def test_a_failed_training_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    runs = plan("digits", [8], ["A"], seeds=1, epochs=1)
    hung = Outcome("timeout", "not done after 3 s")
    counts = command.train_all(runs, lambda one, heard: hung, 2, tmp_path, FOUND, SHEET, QUIET)
    assert counts == {"timeout": 2}
    assert command.unsettled(runs, tmp_path, FOUND, SHEET) == runs
    results.record_environment(tmp_path, FOUND["env_id"], FOUND["facts"])
    page = write_report(tmp_path).read_text()
    assert "cifar_plain8, seed 0: timeout, not done after 3 s" in page


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
    assert rows.gradient_norm_by_layer["cifar_plain8"] == row.joined(done.gradient_norms)
    assert {path.name for path in folder.glob("*.png")} == {
        f"degradation-{name}-digits.png" for name in ("errors", "curves", "gradients")
    }
    page = (folder / "REPORT.md").read_text()
    assert "## Degradation: scikit-learn's digits (8x8 pixels), 1 epoch" in page


# The report


def add(folder: Path, run: Run, train: float, test: float = 10.0) -> None:
    found = {
        "param_count": 0.27, "train_images": 1437, "test_images": 360, "train_error_pct": train,
        "test_error_pct": test, "train_loss": train / 50,
        "train_error_by_epoch_pct": row.joined([90, train]),
        "test_error_by_epoch_pct": row.joined([90, test]),
        "gradient_norm_by_layer": row.joined([1.0] * run.depth),
    }  # fmt: skip
    stamp = Stamp("Xeon 2.9 GHz", FOUND["env_id"], "3f2a91c", "2026-05-09T10:00:00+00:00")
    results.append_row(folder, row.record(run, Outcome("pass", "", found), 1, stamp, SHEET), SHEET)
    results.record_environment(folder, FOUND["env_id"], FOUND["facts"])


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
    assert "60.00 (one seed)" in write_report(tmp_path).read_text()


def test_the_latest_row_of_a_training_stands(study: Path) -> None:
    add(study, replace(RUN, shortcut="A", depth=56, seed=2), 31.5)
    (experiment,) = experiments(read_training_rows(study, SHEET)[FOUND["env_id"]])
    assert len(experiment.finished) == 12
    assert [t.numbers["train_error_pct"] for t in experiment.of("A", 56)] == [1, 1.25, 31.5]


def test_experiments_of_another_length_stand_apart(study: Path) -> None:
    add(study, replace(RUN, epochs=9), 5.0)
    found = experiments(read_training_rows(study, SHEET)[FOUND["env_id"]])
    assert [(e.epochs, len(e.finished)) for e in found] == [(2, 12), (9, 1)]
    page = write_report(study).read_text()
    assert len(re.findall(r"^## Degradation", page, re.MULTILINE)) == 2
    assert len(list(study.glob("degradation-*.png"))) == 6


def test_plots_show_the_means_and_every_layer(study: Path) -> None:
    (experiment,) = experiments(read_training_rows(study, SHEET)[FOUND["env_id"]])
    drawn = errors(experiment)
    assert drawn is not None
    lines = [np.asarray(line.get_ydata()) for line in drawn.axes[0].get_lines()]
    assert any(line.tolist() == pytest.approx([1.25, 60.25]) for line in lines)
    norms = gradients(experiment)
    assert norms is not None
    assert sorted(len(np.asarray(li.get_ydata())) for li in norms.axes[0].get_lines()) == [20, 56]


def test_a_mean_and_its_interval() -> None:
    """Student's t of two degrees of freedom: 4.3027 standard errors."""
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx(
        (2, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4
    )
    assert mean_interval([5.0]) == (5, None, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
