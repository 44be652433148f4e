"""What a network costs at the least: multiply-accumulates, bytes, and their time."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_PRODUCTS = frozenset(
    (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default,
     torch.ops.aten.bmm.default)
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one image's forward pass."""

    param_count: int
    macs: int
    # With stride-1 3x3 convolutions by F(4x4, 3x3): a quarter of their MACs (Lavin & Gray 2016).
    winograd_macs: int
    activations: int  # output elements of convolutions and matrix products
    inputs: int  # elements
    outputs: int


class _OutputCounter(TorchDispatchMode):
    """Counts what FlopCounterMode does not: output elements, and the MACs Winograd would save."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0
        self.saved_by_winograd = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self.activations += out.numel()
        if func is torch.ops.aten.convolution.default:
            weight, stride, dilation = args[1], args[3], args[5]
            if weight.shape[2:] == (3, 3) and set(stride) == {1} and set(dilation) == {1}:
                self.saved_by_winograd += out.numel() * weight[0].numel() * 3 // 4
        return out


def cost(model: nn.Module, img_size: int) -> Cost:
    """Counts one image through a model on the meta device; nothing is computed.

    FLOPs come from torch's own counter (1 MAC = 2 FLOP): convolutions and matrix products, as
    everybody counts them.
    """
    image = torch.empty(1, 3, img_size, img_size, device="meta")
    flops, outputs = FlopCounterMode(display=False), _OutputCounter()
    with torch.no_grad(), flops, outputs:
        out = model(image)
    macs = flops.get_total_flops() // 2
    return Cost(
        param_count=sum(p.numel() for p in model.parameters()),
        macs=macs,
        winograd_macs=macs - outputs.saved_by_winograd,
        activations=outputs.activations,
        inputs=image.numel(),
        outputs=out.numel(),
    )


@dataclass(frozen=True)
class Floor:
    """Least times of a step in ms."""

    ms: float  # direct convolution: what `sol_pct` refers to
    possible_ms: float  # below this, no algorithm in use explains the time: a bug


def floor(
    cost: Cost,
    batch_size: int,
    mode: str,
    element_bytes: int,
    ceilings: Mapping[str, float],
    math_mode: str,
) -> Floor | None:
    """The time the arithmetic, or reading the weights and input and writing the output once, takes
    at the ceilings.

    A training step computes three times the forward pass's MACs (output, input gradient, weight
    gradient).

    Returns:
        None where this device's ceilings are not known.
    """
    rate, copy = ceilings.get(f"ceiling_{math_mode}_tflops"), ceilings.get("ceiling_copy_gb_s")
    if not rate or not copy:
        return None
    passes = 3 if mode == "train" else 1
    moved = (cost.param_count + batch_size * (cost.inputs + cost.outputs)) * element_bytes * passes
    memory_ms = moved / copy / 1e6

    def at(macs: int) -> float:
        return max(2 * macs * passes * batch_size / rate / 1e9, memory_ms)

    # The memory side is left out of what is possible: weights may stay in a cache that a copy of
    # that size does not fit.
    return Floor(at(cost.macs), 2 * cost.winograd_macs * passes * batch_size / rate / 1e9)
