"""The images that networks are trained on: digits that come with scikit-learn, or CIFAR-10.

Digits (scikit-learn's 1,797, of 8x8 grey pixels) are used as they are: not enlarged, grey repeated
in the three channels, so that the paper's networks take them unchanged and their stages see 8, 4
and 2 pixels instead of 32, 16 and 8. 360 of them, the same share of each digit, are kept for
testing; the split never changes, whatever the seed of a training.

CIFAR-10 (Krizhevsky 2009) is read from the batches its author publishes, of either version. Those
for Python are pickles, which can run any code when they are opened; here nothing but numpy's arrays
is let in.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resfuse.bench.common.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

DIGITS, CIFAR, DOWNLOAD = "digits", "cifar10", "download"
DIGITS_FOR_TESTING = 360
TRAIN_FILES, TEST_FILE = tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"
MOST_BYTES = 256 << 20  # of a batch, which has 30 MB
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes of a label and an image in the binary version
ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),  # how protocol 2 writes bytes
}


@dataclass(frozen=True)
class Split:
    images: "Tensor"  # uint8 [N, 3, H, W]
    labels: "Tensor"  # int64 [N]


@dataclass(frozen=True)
class Data:
    """What to train and to test on.

    `shift` and `flip` are the paper's augmentation: crops of the image with `shift` zeros around it
    (an eighth of its side), mirrored half of the time. Digits are not: a mirrored 2 is none.
    """

    name: str
    train: Split
    test: Split
    shift: int  # pixels
    flip: bool


def load(asked: str) -> Data:
    """Returns the data behind `--data`.

    Args:
        asked: "digits", or a folder with CIFAR-10's batches (or that holds their folder).

    Raises:
        UsageError: there is no such folder, it lacks a batch, or a batch is damaged.
    """
    if asked == DIGITS:
        return _digits()
    folder = _cifar_folder(Path(asked))
    return Data(CIFAR, _read(folder, TRAIN_FILES), _read(folder, (TEST_FILE,)), 4, flip=True)


def download(home: Path) -> Path:
    """Fetches CIFAR-10 into a folder by torchvision, which checks its hash, unless it is there.

    Raises:
        UsageError: it cannot be fetched.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    folder = home / str(CIFAR10.base_folder)
    if not all((folder / name).exists() for name in (*TRAIN_FILES, TEST_FILE)):
        try:
            download_and_extract_archive(CIFAR10.url, str(home), md5=CIFAR10.tgz_md5)
        except (OSError, RuntimeError, EOFError) as error:
            raise UsageError(
                f"argument --data: CIFAR-10 cannot be fetched from {CIFAR10.url}: {error}; "
                f"accepted without a network: {DIGITS}, or a folder with its batches"
            ) from None
    return folder


def _digits() -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels.reshape(-1, 1, 8, 8).repeat(3, axis=1).astype(np.uint8),
        labels.astype(np.int64),
        test_size=DIGITS_FOR_TESTING,
        stratify=labels,
        random_state=0,
    )
    import torch

    train, test, train_labels, test_labels = map(torch.from_numpy, parts)
    return Data(DIGITS, Split(train, train_labels), Split(test, test_labels), 1, flip=False)


def _cifar_folder(given: Path) -> Path:
    if not given.is_dir():
        raise UsageError(
            f"argument --data: {given} is not a folder; accepted: {DIGITS}, {DOWNLOAD}, or a "
            "folder with CIFAR-10's batches"
        )
    for folder in (given, given / "cifar-10-batches-py", given / "cifar-10-batches-bin"):
        if _file(folder, TEST_FILE) is not None:
            return folder
    raise UsageError(
        f"argument --data: {given} holds neither {TEST_FILE} nor {TEST_FILE}.bin, CIFAR-10's test "
        "batch in its versions for Python and in binary"
    )


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.bin") if path.is_file()), None)


def _read(folder: Path, names: tuple[str, ...]) -> Split:
    splits = []
    for name in names:
        path = _file(folder, name)
        if path is None:
            raise UsageError(f"argument --data: {folder} lacks {name} (or {name}.bin) of CIFAR-10")
        read: Callable[[Path], Split] = _read_binary if path.suffix == ".bin" else _read_pickle
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES >> 20} MB")
            splits.append(read(path))
        except Exception as error:  # a damaged pickle may raise anything
            raise UsageError(
                f"argument --data: {path} cannot be read as a batch of CIFAR-10: {error}"
            ) from None
    import torch

    return Split(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits]))


def _read_binary(path: Path) -> Split:
    data = np.fromfile(path, dtype=np.uint8)
    if not len(data) or len(data) % CIFAR_RECORD:
        raise ValueError(f"{len(data)} bytes are no whole number of {CIFAR_RECORD}-byte images")
    records = data.reshape(-1, CIFAR_RECORD)
    return _split(records[:, 1:], records[:, 0])


def _read_pickle(path: Path) -> Split:
    with path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    for name in (b"data", b"labels"):
        if name not in batch:
            raise ValueError(f"it has no {name.decode()}")
    return _split(np.asarray(batch[b"data"]), np.asarray(batch[b"labels"]))


def _split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != CIFAR_RECORD - 1:
        raise ValueError(f"its images are {pixels.dtype} {list(pixels.shape)}, not uint8 [N, 3072]")
    if labels.shape != pixels.shape[:1] or not np.isin(labels, range(10)).all():
        raise ValueError("its labels are not one number from 0 to 9 for each image")
    import torch

    images = pixels.reshape(-1, 3, 32, 32).copy()
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


class _ArraysOnly(pickle.Unpickler):
    """Lets in what an array of numbers is made of, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(f"it asks for {module}.{name}, which no array of numbers needs")
        return super().find_class(module, name)
