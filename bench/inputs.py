"""Real photographs as network inputs: random numbers make some kernels look faster than they are,
and hide errors.

The bundled ones ship with scikit-image and scikit-learn. Batches are random crops and flips of
them, so that any number of different images can be had from a dozen files; a seed always gives the
same batch.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from resfuse.bench.errors import UsageError

BUNDLED = "bundled"
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
    from skimage import data
    from sklearn.datasets import load_sample_images

    colour = (
        data.astronaut,
        data.chelsea,
        data.coffee,
        data.rocket,
        data.retina,
        data.hubble_deep_field,
    )
    pictures = [picture() for picture in (*colour, data.immunohistochemistry)]
    pictures += [data.stereo_motorcycle()[0], *load_sample_images().images]
    return [Image.fromarray(picture).convert("RGB") for picture in pictures]


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
