"""What a network costs at the least: multiply-accumulates, bytes, and their time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from resfuse.bench.models.meta_shapes import result_on_meta


@dataclass(frozen=True)
class Cost:
    """The cost of one image's forward pass."""

    param_count: int
    macs: int
    # With stride-1 3x3 convolutions by F(4x4, 3x3): a quarter of their MACs (Lavin & Gray 2016).
    winograd_macs: int
    activations: int  # output elements of convolutions and matrix products
    inputs: int  # elements
    outputs: int


class _Counter(TorchFunctionMode):
    """Counts the products of a forward pass on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.winograd_macs = 0
        self.activations = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = result_on_meta(func, args, kwargs or {})
        if out is None:
            out = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            _, weight, _, stride, _, dilation, _ = args
            dense = set(stride) == set(dilation) == {1}
            self._count(out, weight, dense and weight.shape[2:] == (3, 3))
        elif func is F.linear:
            self._count(out, args[1])
        return out

    def _count(self, out: Tensor, weight: Tensor, winograd: bool = False) -> None:
        macs = out.numel() * weight[0].numel()
        self.macs += macs
        self.winograd_macs += macs // 4 if winograd else macs
        self.activations += out.numel()


def cost(model: nn.Module, image: int | tuple[int, int, int]) -> Cost:
    """Counts one image through a network of MODELS on the meta device; nothing is computed.

    Convolutions and linear layers count, as for everybody (1 MAC = 2 FLOP).

    Args:
        image: pixels a side, or channels, height and width.
    """
    shape = (3, image, image) if isinstance(image, int) else image
    images = torch.empty(1, *shape, device="meta")
    counter = _Counter()
    with torch.no_grad(), counter:
        out = model(images)
    return Cost(
        param_count=sum(p.numel() for p in model.parameters()),
        macs=counter.macs,
        winograd_macs=counter.winograd_macs,
        activations=counter.activations,
        inputs=images.numel(),
        outputs=sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)),
    )


class _OpCounter(TorchDispatchMode):
    """Counts what torch.utils.flop_counter counts, operator by operator as they run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.winograd_macs = 0
        self.activations = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:  # as FlopCounterMode: aten.conv2d is made of counted ones
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if packet in flop_registry:
            macs = flop_registry[packet](*args, **kwargs, out_val=out) // 2
            self.macs += macs
            self.winograd_macs += macs // 4 if _is_winograd(packet, args) else macs
            self.activations += sum(y.numel() for y in tree_leaves(out) if isinstance(y, Tensor))
        return out


def _is_winograd(packet: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a 3x3 convolution of stride 1."""
    if packet is not torch.ops.aten.convolution:
        return False
    _, weight, _, stride, _, dilation, transposed, *_ = args
    return weight.shape[2:] == (3, 3) and {*stride, *dilation} == {1} and not transposed


def cost_of_run(model: nn.Module, images: Tensor) -> Cost:
    """Counts one run of any network; numbers are an image's share.

    Convolutions and matrix products count, as for torch's FlopCounterMode.

    Args:
        images: [N, C, H, W], on the model's device and in its dtype.
    """
    counter = _OpCounter()
    with torch.no_grad(), counter:
        out = model(images)
    given = sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    n = len(images)
    return Cost(
        param_count=sum(p.numel() for p in model.parameters()),
        macs=counter.macs // n,
        winograd_macs=counter.winograd_macs // n,
        activations=counter.activations // n,
        inputs=images.numel() // n,
        outputs=given // n,
    )


@dataclass(frozen=True)
class Floor:
    """Times of a step in ms at the ceilings of a device."""

    # With every convolution computed directly: what `sol_pct` refers to. Winograd may pass it.
    ms: float
    # Winograd's F(4x4, 3x3) granted to every 3x3: below this a time is a bug and fails the row.
    possible_ms: float


def floor(
    cost: Cost,
    batch_size: int,
    mode: str,
    element_bytes: int,
    ceilings: Mapping[str, float],
    math_mode: str,
) -> Floor | None:
    """Returns the time the arithmetic, or reading the weights and input and writing the output
    once, takes at the ceilings.

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
