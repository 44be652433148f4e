"""Real photographs as network inputs: random numbers make some kernels look faster than they are,
and hide errors.

The bundled ones ship with scikit-image and scikit-learn. Batches are random crops and flips of
them, so that any number of different images can be had from a dozen files; a seed always gives the
same batch.
"""

import warnings
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resfuse.bench.common.errors import UsageError

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
BAND_SEEDS = 100_000_000  # from one photograph of an image with many bands to its next
ALL = slice(None)
# ImageNet's channel statistics, as torchvision and timm normalise with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def batch(
    source: str,
    count: int,
    size: int | tuple[int, int],
    seed: int,
    channels: int = 3,
    share: slice = ALL,
) -> torch.Tensor:
    """A batch of normalised photographs.

    Args:
        source: "bundled", or a folder of image files.
        count: images.
        size: pixels a side, or height and width.
        seed: which crops; another seed gives other images.
        channels: 1 is the mean of the colours; more than three are those of several photographs.
        share: which of the photographs are cropped, in order; crops of other shares have no pixel
            in common with them.

    Returns:
        float32 tensor of [count, channels, height, width] on the CPU.

    Raises:
        UsageError: the folder is missing or has no images, or a file in it is not one.
    """
    if channels == 1:
        return batch(source, count, size, seed, share=share).mean(1, keepdim=True)
    if channels != 3:
        several = range(-(-channels // 3))
        seeds = [seed + BAND_SEEDS * band for band in several]
        bands = [batch(source, count, size, each, share=share) for each in seeds]
        return torch.cat(bands, 1)[:, :channels].contiguous()
    photographs = (_bundled() if source == BUNDLED else _folder(Path(source)))[share]
    if not photographs:
        raise UsageError(f"argument --images: {source} holds too few photographs to be shared out")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(photographs))
    height, width = (size, size) if isinstance(size, int) else size
    crops = [_crop(photographs[order[i % len(order)]], height, width, rng) for i in range(count)]
    pixels = np.stack(crops).astype(np.float32) / 255
    normalised = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()


def _crop(photograph: Image.Image, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of 35-100 % of the shorter side, half of them flipped, resized."""
    side = int(min(photograph.size) * rng.uniform(0.35, 1.0))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
    resized = photograph.resize(
        (width, height), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
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
    """Raises UsageError for what is no image, or one so large that Pillow takes it for an attack:
    a few kilobytes that unpack to gigabytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UsageError(
            f"argument --images: {path} has more than {Image.MAX_IMAGE_PIXELS} pixels, which may "
            "be an attack; scale it down"
        ) from None
    # Pillow raises whatever its decoders meet: ValueError for a text chunk that unpacks to
    # megabytes, SyntaxError for a broken PNG, struct.error and EOFError for others.
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"argument --images: {path} cannot be read as an image: {said}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel. Pillow clips deeper greys at 255: 16 bits are scaled; wider integers and
    floats, of which nothing says where white is, from the least to the greatest value."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values, low, high = np.asarray(image, np.float64), 0.0, 65535.0
    elif image.mode in ("I", "F"):
        values = np.asarray(image, np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    else:
        return image.convert("RGB")
    scaled = (values - low) / max(high - low, np.finfo(float).tiny)
    return Image.fromarray((255 * scaled).round().clip(0, 255).astype(np.uint8)).convert("RGB")
