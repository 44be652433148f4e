"""Networks as torch's PT2E quantises them, written by hand of the operations that torch itself
registers: each value is made integers and numbers again before it is read, and weights are integers
with a scale for each channel, or one for all."""

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels.ops.quantization import Quantization
from scope import Scope

OPS = torch.ops.quantized_decomposed
Kind = tuple[int, int, torch.dtype]
U8, S8 = (0, 255, torch.uint8), (-128, 127, torch.int8)


class Pair(nn.Module):
    """Rounds a value as the least and largest number of its first input ask for."""

    def __init__(self, kind: Kind, like: "Pair | None" = None) -> None:
        super().__init__()
        self.kind, self.like = kind, [like]
        self.how: tuple[Any, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.how is None:
            self.how = self._seen(x) if self.like[0] is None else self.like[0].how
        return OPS.dequantize_per_tensor.default(
            OPS.quantize_per_tensor.default(x, *self.how), *self.how
        )

    def _seen(self, x: Tensor) -> tuple[Any, ...]:
        least, most, _ = self.kind
        low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
        scale = torch.tensor((high - low) / (most - least)).item()
        zero_point = min(max(least - round(low / scale), least), most)
        return scale, zero_point, *self.kind

    @property
    def stored(self) -> Quantization:
        """How an engine is to store the value."""
        assert self.how is not None
        scale, zero_point, least, *_ = self.how
        return Quantization(scale, zero_point - least)


class Weight(nn.Module):
    """Integers of -128..127, each of which every channel has, as far as it is large enough."""

    def __init__(self, *shape: int, by_channel: bool = True) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(sum(shape))
        whole = torch.randint(-128, 128, shape, generator=draw, dtype=torch.int8)
        whole.flatten(1)[:, 0], whole.flatten(1)[:, -1] = -128, 127
        self.register_buffer("whole", whole)
        self.register_buffer("scales", 1e-3 + 2e-3 * torch.rand(shape[0], generator=draw))
        self.register_buffer("zeros", torch.zeros(shape[0], dtype=torch.int64))
        self.by_channel = by_channel

    def forward(self) -> Tensor:
        if self.by_channel:
            return OPS.dequantize_per_channel.default(self.whole, self.scales, self.zeros, 0, *S8)
        return OPS.dequantize_per_tensor.default(self.whole, 0.002, 0, *S8)


def residual(kind: Kind, by_channel: bool) -> nn.Module:
    """Convolutions, a shortcut with a projection, a max-pool, a mean and a linear layer."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.q1(F.relu(F.conv2d(s.q0(x), s.w1(), s.b1, 2, 1)))
        x = s.q2(F.max_pool2d(x, 3, 2, 1))
        y = s.q3(F.relu(F.conv2d(x, s.w2(), s.b1, 1, 1)))
        x = s.q5(F.relu(F.conv2d(y, s.w3(), s.b2, 1, 1) + s.q4(F.conv2d(x, s.w4(), s.b2))))
        x = s.q6(F.adaptive_avg_pool2d(x, 1))
        return s.q8(F.linear(s.q7(torch.flatten(x, 1)), s.w5()))

    pairs = {f"q{i}": Pair(kind) for i in (0, 1, 3, 4, 5, 6)}
    weights = {
        "w1": Weight(24, 3, 3, 3, by_channel=by_channel),
        "w2": Weight(24, 24, 3, 3, by_channel=by_channel),
        "w3": Weight(32, 24, 3, 3, by_channel=by_channel),
        "w4": Weight(32, 24, 1, 1, by_channel=by_channel),
        "w5": Weight(10, 32, by_channel=by_channel),
    }
    return Scope(
        forward, **pairs, q2=Pair(kind, pairs["q1"]), q7=Pair(kind, pairs["q6"]), **weights,
        b1=nn.Parameter(torch.linspace(-0.1, 0.1, 24)),
        b2=nn.Parameter(torch.linspace(-0.2, 0.1, 32)), q8=Pair(kind),
    )  # fmt: skip


def joined(kind: Kind, by_channel: bool) -> nn.Module:
    """A depthwise convolution, an average pool of nine, which no mean leaves halfway between two
    integers, hard-swish, a sum of maps, and a concatenation of maps that share a scale."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.q1(F.hardswish(F.conv2d(s.q0(x), s.w1(), None, 1, 1)))
        y = s.q2(F.conv2d(x, s.w2(), None, 1, 1, 1, 16))
        x = s.q3(x + y)
        x = s.q5(torch.cat([s.q4(F.avg_pool2d(x, 3, 2)), s.q5(F.max_pool2d(x, 3, 2))], 1))
        return s.q6(F.relu6(F.conv2d(x, s.w3(), None, 1, 1)))

    pairs = {f"q{i}": Pair(kind) for i in (0, 1, 2, 3)}
    shared = {name: Pair(kind, pairs["q3"]) for name in ("q4", "q5")}
    return Scope(
        forward, **pairs, **shared, q6=Pair(kind),
        w1=Weight(16, 3, 3, 3, by_channel=by_channel),
        w2=Weight(16, 1, 3, 3, by_channel=by_channel),
        w3=Weight(20, 32, 3, 3, by_channel=by_channel),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[Kind, bool], nn.Module]] = {"residual": residual, "joined": joined}


def pairs_of(model: nn.Module) -> list[Pair]:
    return [module for module in model.modules() if isinstance(module, Pair)]
