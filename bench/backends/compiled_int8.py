"""A network in int8 as torchao's PT2E makes it for torch.compile on x86: a program of torch.export
whose values and weights are rounded to integers, of which inductor makes oneDNN's int8 kernels."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resfuse.bench.backends.compute import windows
from resfuse.bench.common.errors import CannotTake, Unavailable
from resfuse.bench.common.vnni import saturates

PREPACKED = ("qconv_weight_prepack_matcher_count", "qlinear_weight_prepack_matcher_count")


def quantized(model: nn.Module, example: Tensor, calibration: Tensor) -> nn.Module:
    """Returns a network quantized by torchao's X86InductorQuantizer with its own defaults: values
    in u8 by a histogram's least squared error, weights in s8 for each output channel. Where the
    processor has no VNNI, values have 7 bits, as its makers recommend (`reduce_range`).

    The network is captured by `torch.export.export(strict=True)`. Without `strict` torch 2.14
    records which module an operation is of, but not which of its calls, and torchao takes the two
    calls of the ReLU of a torchvision block for one operation and refuses: "Input partition has
    more than one output node".

    Args:
        example: of the batch size that the network is to take.
        calibration: photographs [N, C, H, W] in fp32, all of which are used.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        CannotTake: torch cannot capture the network, or torchao does not take it.
    """
    with _quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(
            x86.get_default_x86_inductor_quantization_config(reduce_range=saturates())
        )
        try:
            with torch.no_grad():
                program = torch.export.export(model, (example,), strict=True).module()
                prepared = prepare_pt2e(program, quantizer)
                for images in windows(calibration, len(example)):
                    prepared(images)
                converted: nn.Module = convert_pt2e(prepared)
        except Exception as error:  # dynamo and torchao raise whatever they meet
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CannotTake(f"torchao's PT2E: {said}") from error
    return converted


def prepacked() -> int:
    """Returns how many convolutions and products inductor has made int8 kernels of in this
    process, by its own account."""
    from torch._dynamo.utils import counters

    return sum(counters["inductor"][name] for name in PREPACKED)


def require_integers(before: int) -> None:
    """Raises Unavailable where inductor has made no int8 kernel since `before`, which `prepacked`
    returned."""
    if prepacked() == before:
        raise Unavailable("torch.compile computes no convolution or product in int8 here")


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao and dynamo warn of what does not concern a reader of rows."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
