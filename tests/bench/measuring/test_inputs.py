"""Photographs in, floor and cost out."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.flop_counter import FlopCounterMode

from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring import photographs
from resfuse.bench.measuring.probes import roofline
from resfuse.resnet_ref import create, input_size


def test_a_seed_gives_the_same_photographs_and_another_seed_others() -> None:
    first, again = (photographs.batch("bundled", 12, 48, 3) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (12, 3, 48, 48)
    assert not torch.equal(first, photographs.batch("bundled", 12, 48, 4))
    distances = torch.cdist(first.flatten(1), first.flatten(1)) + 1e9 * torch.eye(12)
    assert distances.min() > 1  # all twelve differ


def test_photographs_look_like_normalised_images() -> None:
    pixels = photographs.batch("bundled", 64, 32, 0)
    assert pixels.abs().max() < 3
    assert pixels.mean().abs() < 1
    assert 0.5 < pixels.std() < 1.5


def test_the_users_own_images_are_used(tmp_path: Path) -> None:
    """A red and a blue picture; nothing else may come out, and other files are passed over."""
    for name, colour in (("red.png", (255, 0, 0)), ("blue.jpg", (0, 0, 255))):
        Image.new("RGB", (80, 60), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    images = photographs.batch(str(tmp_path), 4, 16, 0)
    pixels = images * torch.tensor(photographs.STD)[:, None, None]
    pixels += torch.tensor(photographs.MEAN)[:, None, None]
    colours = {tuple(round(v) for v in image.mean((1, 2)).tolist()) for image in pixels}
    assert colours == {(1, 0, 0), (0, 0, 1)}


def grey_levels(folder: Path) -> torch.Tensor:
    pixels = (
        photographs.batch(str(folder), 8, 32, 0)[:, 0] * photographs.STD[0] + photographs.MEAN[0]
    )
    return (255 * pixels).round().unique()


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_deep_greys_are_scaled_and_not_clipped(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 65535, 10000).reshape(100, 100)
    file = tmp_path / ("a.png" if kind == "uint16" else "a.tif")
    Image.fromarray(ramp.astype(kind)).save(file)
    file.rename(tmp_path / "a.png")  # Pillow goes by the content
    levels = grey_levels(tmp_path)
    assert len(levels) > 60 and levels.min() < 60 and levels.max() > 190
    assert not (levels == 255).all()


def bomb(path: Path, side: int) -> None:
    """A PNG of one bit a pixel, which some kilobytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(side // 8)) * side, 9)
    parts = chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def with_text(path: Path) -> None:
    info = PngInfo()
    info.add_text("k", "x" * 3_000_000, zip=True)
    Image.new("RGB", (50, 50)).save(path, pnginfo=info)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: bomb(p, 20000), "pixels, which may be an attack"),
        (lambda p: bomb(p, 10400), "pixels, which may be an attack"),
        (with_text, "cannot be read as an image: Decompressed data too large"),
        (lambda p: p.write_text("<html>404</html>"), "cannot be read as an image"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), "cannot be read as an image"),
    ],
)
def test_hostile_images_are_refused_in_a_sentence(tmp_path: Path, make: Any, said: str) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(UsageError, match=f"argument --images: .*{said}") as refusal:
        photographs.batch(str(tmp_path), 2, 32, 0)
    assert "\n" not in str(refusal.value)


def test_cost_counts_what_timm_counts() -> None:
    """timm's results list 4.11 GMACs, 11.11 M activations and 25.56 M parameters for ResNet-50.

    Its 4.11 includes batch norm; convolutions and the classifier alone are 4.09.
    """
    cost = roofline.cost(create("resnet50", device="meta").eval(), 224)
    assert round(cost.macs / 1e9, 2) == 4.09
    assert round(cost.activations / 1e6, 2) == 11.11
    assert round(cost.param_count / 1e6, 2) == 25.56


# One of each construction; the deep ones repeat the same blocks.
@pytest.mark.parametrize(
    "name",
    ["resnet18_a", "resnet50", "resnext50_32x4d", "vgg19_bn", "cifar_preact164", "cifar_resnet20"],
)
def test_cost_counts_what_torch_counts_on_real_numbers(name: str) -> None:
    model, size = create(name).eval(), input_size(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(torch.zeros(1, 3, size, size))
    cost = roofline.cost(create(name, device="meta").eval(), size)
    assert 2 * cost.macs == counter.get_total_flops()
    assert cost.outputs == out.numel()


def test_winograd_saves_three_quarters_of_the_3x3s() -> None:
    """Every convolution of a VGG is a stride-1 3x3; its classifier is not."""
    cost = roofline.cost(create("vgg19", device="meta").eval(), 224)
    classifier = 512 * 49 * 4096 + 4096 * 4096 + 4096 * 1000
    assert cost.winograd_macs - classifier == (cost.macs - classifier) // 4


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    cost = roofline.Cost(
        param_count=10**6, macs=10**9, winograd_macs=5 * 10**8, activations=0, inputs=0, outputs=0
    )
    fast_memory = {"ceiling_ieee_tflops": 1.0, "ceiling_copy_gb_s": 1e6}
    slow_memory = {"ceiling_ieee_tflops": 1.0, "ceiling_copy_gb_s": 1.0}
    one = roofline.floor(cost, 1, "inference", 4, fast_memory, "ieee")
    assert (one.ms, one.possible_ms) == pytest.approx((2.0, 1.0))
    assert roofline.floor(cost, 8, "inference", 4, fast_memory, "ieee").ms == pytest.approx(16)
    assert roofline.floor(cost, 1, "train", 4, fast_memory, "ieee").ms == pytest.approx(6)
    assert roofline.floor(cost, 1, "inference", 4, slow_memory, "ieee").ms == pytest.approx(4)
    assert roofline.floor(cost, 1, "inference", 4, fast_memory, "bf16") is None
