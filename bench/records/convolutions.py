"""The distinct convolutions of a network, each with how often it occurs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from resfuse.bench.records.case import Case
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of
from resfuse.resnet_ref import create


@dataclass(frozen=True)
class Convolution:
    """One distinct convolution of a network, at one batch size and precision, on one device."""

    model: str
    img_size: int  # pixels, square, of the network's input
    device: str
    precision: str
    layer: str  # the first module that computes it
    count: int  # modules that do
    problem: ConvProblem

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Convolution":
        """Returns the convolution that `to_plain` and JSON have made plain data of."""
        return cls(**{**plain, "problem": ConvProblem.from_plain(plain["problem"])})

    def to_plain(self) -> dict[str, Any]:
        """Returns it as JSON takes it."""
        return {**vars(self), "problem": self.problem.to_plain()}

    @property
    def shape(self) -> str:
        """`8x64x56x56 k64 3x3`, with the padding where it is not half the window."""
        p = self.problem
        usual = (p.dilation[0] * (p.r - 1) // 2, p.dilation[1] * (p.s - 1) // 2)
        padding = "" if p.padding == usual else f" pad {p.padding[0]}"
        return p.label() + padding

    def label(self) -> str:
        """Returns a line for progress."""
        return f"{self.model} {self.shape} {self.precision}"


def convolutions(case: Case) -> list[Convolution]:
    """Returns every distinct convolution of a case's network, in the order they first run.

    The network runs once on the meta device: shapes are found, nothing is computed.
    """
    with torch.device("meta"):
        model = create(case.model).eval()
        images = torch.empty(case.batch_size, 3, case.img_size, case.img_size)
    found: dict[ConvProblem, Convolution] = {}

    def saw(name: str, conv: nn.Conv2d, x: torch.Tensor) -> None:
        problem = _problem(conv, x, case.math_mode)
        known = found.get(problem)
        found[problem] = (
            replace(known, count=known.count + 1)
            if known
            else Convolution(
                case.model, case.img_size, case.device, case.precision, name, 1, problem
            )
        )

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda conv, inputs, name=name: saw(name, conv, inputs[0])
            )
    with torch.no_grad():
        model(images)
    return list(found.values())


def every(cases: Iterable[Case]) -> list[Convolution]:
    """Returns the convolutions of several cases, one case after the other."""
    return [convolution for case in cases for convolution in convolutions(case)]


def _problem(conv: nn.Conv2d, x: torch.Tensor, math_mode: str) -> ConvProblem:
    assert not isinstance(conv.padding, str) and conv.padding_mode == "zeros"
    n, c, h, w = x.shape
    k, (r, s) = conv.out_channels, conv.kernel_size
    geometry = Geometry.of(conv.stride, conv.padding, conv.dilation, conv.groups)
    return ConvProblem(n, c, h, w, k, r, s, geometry, Epilogue("relu"), dtypes_of(math_mode))
