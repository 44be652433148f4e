"""What the studies train on: scikit-learn's digits, and CIFAR-10's files."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resfuse.bench.cli import main
from resfuse.bench.trainings import data


def test_digits_are_split_once_for_all() -> None:
    one, other = data.load("digits"), data.load("digits")
    assert (len(one.train.labels), len(one.test.labels)) == (1437, 360)
    assert torch.equal(one.train.images, other.train.images)
    assert list(one.train.images.shape[1:]) == [3, 8, 8]
    assert torch.equal(one.train.images[:, 0], one.train.images[:, 2])
    shares = torch.bincount(one.test.labels) / 360 - torch.bincount(one.train.labels) / 1437
    assert shares.abs().max() < 0.003  # each digit has the same share of both


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
