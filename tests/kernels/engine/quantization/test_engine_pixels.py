"""`build_engine(model, example, pixels=Pixels(mean, std))`: engines that take uint8."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels import Engine, Pixels, build_engine, load_engine

PIXELS = Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
STEMS = {"7x7/2": (7, 2, 3), "3x3": (3, 1, 1), "no padding": (3, 2, 0)}


class Stem(nn.Module):
    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 13, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def pixels(count: int, size: tuple[int, int] = (17, 22), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 300 - 20
    smooth = F.interpolate(coarse, size, mode="bilinear")
    return smooth.clamp(0, 255).round().to(torch.uint8)


def exact(model: Stem, x: Tensor) -> Tensor:
    """The model on normalised images in fp64."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (PIXELS.mean, PIXELS.std))
    weight, bias = model.conv.weight.double(), model.conv.bias.double()
    how = model.conv.stride, model.conv.padding
    return F.conv2d((x.double() / 255 - mean) / std, weight, bias, *how).detach()


def padded_with_black(model: Stem, x: Tensor) -> Tensor:
    """What an engine would answer that pads pixels with zeros, not normalised images."""
    bare = Stem(model.conv.kernel_size[0], model.conv.stride[0], 0)
    bare.load_state_dict(model.state_dict())
    return exact(bare, F.pad(x, [int(model.conv.padding[0])] * 4))


def error(y: Tensor, want: Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


def built(stem: str, x: Tensor, precision: str) -> tuple[Stem, Engine]:
    model = Stem(*STEMS[stem]).eval()
    given = {"calibration": pixels(40, x.shape[2:], seed=1)} if precision == "int8" else {}
    return model, build_engine(model, x, precision=precision, pixels=PIXELS, **given)


@pytest.mark.parametrize("stem", STEMS)
def test_int8_answers_for_normalised_pixels_borders_included(stem: str, tmp_path: Path) -> None:
    x = pixels(2)
    model, engine = built(stem, x, "int8")
    want, y = exact(model, x), engine(x)
    assert engine.precision == "int8"
    assert error(y, want) < 0.02
    black = padded_with_black(model, x)
    for edge in ((..., 0, slice(None)), (..., -1, slice(None)), (..., 0), (..., -1)):
        assert error(y[edge], want[edge]) < 0.02
        if STEMS[stem][2]:
            assert error(black[edge], want[edge]) > 0.1
    dark = torch.zeros_like(x)
    assert error(engine(dark), exact(model, dark)) < 0.02
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(engine(last), y)
    engine.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert torch.equal(loaded(x), y)
    with pytest.raises(ValueError, match=r"float32; this engine takes torch\.uint8"):
        loaded(x.float())
    assert "uint8 pixels, computed in int8" in repr(loaded)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 0.01)])
def test_other_precisions_take_pixels(precision: str, bound: float, tmp_path: Path) -> None:
    x = pixels(1)
    model, engine = built("7x7/2", x, precision)
    assert engine.precision == precision
    assert error(engine(x), exact(model, x)) < bound
    engine.save(tmp_path / "engine")
    assert torch.equal(load_engine(tmp_path / "engine")(x), engine(x))


@pytest.mark.parametrize("other_batches", ["pad", "eager"])
def test_other_batches_and_shapes_are_normalised(other_batches: str) -> None:
    model = Stem(3, 1, 1).eval()
    engine = build_engine(
        model, pixels(2), pixels=PIXELS, other_batches=other_batches, other_shapes="build"
    )
    for x in (pixels(1, seed=2), pixels(2, (9, 11), seed=3)):
        assert error(engine(x), exact(model, x)) < 1e-6


def test_onnx_files_take_pixels(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x, path = pixels(1), str(tmp_path / "net.onnx")
    _, engine = built("7x7/2", x, "int8")
    engine.export_onnx(path)
    session = onnxruntime.InferenceSession(path)
    given = session.get_inputs()[0]
    assert given.type == "tensor(uint8)"
    (y,) = session.run(None, {given.name: x.numpy()})
    assert error(torch.from_numpy(y), engine(x).double()) < 0.02


def test_images_of_a_list_are_normalised_and_floats_refused() -> None:
    model, x = Stem(3, 1, 1).eval(), pixels(1)
    many = pixels(40, seed=1)
    want = build_engine(model, x, precision="int8", calibration=many, pixels=PIXELS)(x)
    for given in ([(image, 0) for image in many], iter(list(many))):
        engine = build_engine(model, x, precision="int8", calibration=given, pixels=PIXELS)
        assert torch.equal(engine(x), want)
    with pytest.raises(ValueError, match=r"argument calibration: torch\.float32"):
        build_engine(model, x, precision="int8", calibration=many.float(), pixels=PIXELS)
    with pytest.raises(ValueError, match="a function that calls the model"):
        build_engine(model, x, precision="int8", calibration=lambda m: m(x), pixels=PIXELS)


def test_what_is_not_right_is_refused() -> None:
    model, x = Stem(3, 1, 1).eval(), pixels(1)
    with pytest.raises(ValueError, match=r"argument example: torch\.float32"):
        build_engine(model, x.float(), pixels=PIXELS)
    with pytest.raises(ValueError, match=r"accepted: \[N, 3, H, W\]"):
        build_engine(model, x[:, :2], pixels=PIXELS)
    with pytest.raises(ValueError, match="accepted: Pixels"):
        build_engine(model, x, pixels=(0.5, 0.5))  # type: ignore[arg-type]
    for mean, std in (((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((float("nan"),), (1.0,)), ((), ())):
        with pytest.raises(ValueError, match=r"argument (mean|std)"):
            Pixels(mean, std)
