"""Real photographs as network inputs: random numbers make some kernels look faster than they are,
and hide errors.

The bundled ones ship with scikit-image and scikit-learn. Batches are random crops and flips of
them, so that any number of different images can be had from a dozen files; a seed always gives the
same batch.
"""

from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from resfuse.bench.errors import UsageError

BUNDLED = "bundled"
# Read where the packages have them: importing scikit-learn takes every case's process two seconds.
_BUNDLED_FILES = {
    "scikit-image": (
        "skimage/data/astronaut.png",
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "skimage/data/rocket.jpg",
        "skimage/data/retina.jpg",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png",
        "skimage/data/motorcycle_left.png",
    ),
    "scikit-learn": ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
}
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))
MOST_FILES = 256  # of the user's folder, in name order; more would only cost memory
# ImageNet's channel statistics, as torchvision and timm normalise with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def batch(source: str, count: int, size: int, seed: int) -> torch.Tensor:
    """A batch of normalised photographs.

    Args:
        source: "bundled", or a folder of image files.
        count: images.
        size: pixels a side.
        seed: which crops; another seed gives other images.

    Returns:
        float32 tensor of [count, 3, size, size] on the CPU.

    Raises:
        UsageError: the folder is missing or has no images, or a file in it is not one.
    """
    photographs = _bundled() if source == BUNDLED else _folder(Path(source))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(photographs))
    crops = [_crop(photographs[order[i % len(order)]], size, rng) for i in range(count)]
    pixels = np.stack(crops).astype(np.float32) / 255
    normalised = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()


def _crop(photograph: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of 35-100 % of the shorter side, half of them flipped, resized."""
    side = int(min(photograph.size) * rng.uniform(0.35, 1.0))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
    resized = photograph.resize(
        (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
    )
    pixels = np.asarray(resized)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


@cache
def _bundled() -> list[Image.Image]:
    return [
        _open(Path(str(metadata.distribution(package).locate_file(file))))
        for package, files in _BUNDLED_FILES.items()
        for file in files
    ]


@cache
def _folder(folder: Path) -> list[Image.Image]:
    if not folder.is_dir():
        raise UsageError(f"argument --images: {folder} is not a folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[
        :MOST_FILES
    ]
    if not files:
        raise UsageError(
            f"argument --images: {folder} holds no image ({', '.join(sorted(SUFFIXES))})"
        )
    return [_open(path) for path in files]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UsageError(f"argument --images: {path} cannot be read as an image: {error}") from None
