"""The distinct convolutions of a network, each with how often it occurs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from resfuse.bench.models.meta_shapes import result_on_meta
from resfuse.bench.models.model_builder import batch_size, build
from resfuse.bench.models.sources import is_ours
from resfuse.bench.models.zoo import on_meta
from resfuse.bench.records.case import Case
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of


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

    Our networks run once on the meta device, where shapes are found and nothing is computed; others
    run on one image, or on the only batch they take.
    """
    ours = is_ours(case.model)
    model = on_meta(case.model) if ours else build(case.model)
    batch = case.batch_size if ours else batch_size(case.model) or 1
    images = torch.zeros(batch, *case.input_shape, device="meta" if ours else "cpu")
    seen = _Seen(model, case.batch_size / batch, case.math_mode)
    with torch.no_grad(), seen:
        model(images)
    seen.remove()
    return [
        Convolution(case.model, case.img_size, case.device, case.precision, name, count, problem)
        for problem, (name, count) in seen.found.items()
    ]


class _Seen(TorchFunctionMode):
    """Collects the 2-D convolutions of a forward pass, each with the module that computes it."""

    def __init__(self, model: nn.Module, scale: float, math_mode: str) -> None:
        super().__init__()
        self.found: dict[ConvProblem, tuple[str, int]] = {}
        self._scale, self._math_mode = scale, math_mode
        self._names: list[str] = [""]
        self._hooks = [
            handle
            for name, module in model.named_modules()
            for handle in (
                module.register_forward_pre_hook(lambda *_, name=name: self._names.append(name)),
                module.register_forward_hook(lambda *_: self._left()),
            )
        ]

    def _left(self) -> None:
        self._names.pop()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.conv2d or func is torch.ops.aten.conv2d.default:
            problem = self._problem(*args, **(kwargs or {}))
            name, count = self.found.get(problem, (self._names[-1], 0))
            self.found[problem] = name, count + 1
        out = result_on_meta(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if out is None else out

    def _problem(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> ConvProblem:
        n, c, h, w = input.shape
        k, _, r, s = weight.shape
        dilated = _pair(dilation)
        if padding == "same":  # torch pads one pixel more behind where that is odd
            padding = [dilated[0] * (r - 1) // 2, dilated[1] * (s - 1) // 2]
        elif padding == "valid":
            padding = 0
        assert not isinstance(padding, str)
        geometry = Geometry(_pair(stride), _pair(padding), dilated, groups)
        images = round(n * self._scale)
        dtypes = dtypes_of(self._math_mode)
        return ConvProblem(images, c, h, w, k, r, s, geometry, Epilogue("relu"), dtypes)


def every(cases: Iterable[Case]) -> list[Convolution]:
    """Returns the convolutions of several cases, one case after the other."""
    return [convolution for case in cases for convolution in convolutions(case)]


def _pair(sizes: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(sizes, int):
        return sizes, sizes
    return sizes[0], sizes[-1]
