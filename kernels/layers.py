"""What fuse() takes a module for: a convolution, a batch norm, an activation, and why not."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from resfuse.kernels.activation import Slope
from resfuse.kernels.onednn import Geometry
from resfuse.kernels.scope import has_hooks

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FROZEN_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision, detectron2; timm


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, but for what cannot be copied: the process groups of its SyncBatchNorms."""
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    groups = [norm.process_group for norm in norms if norm.process_group is not None]
    return deepcopy(model, {id(group): group for group in groups})


def why_not_conv(conv: nn.Conv2d) -> str | None:
    """The reason to leave a convolution alone; None where there is none."""
    if hasattr(conv, "parametrizations"):
        return "its weight is parametrized"
    if type(conv).forward is not nn.Conv2d.forward or (
        type(conv)._conv_forward is not nn.Conv2d._conv_forward
    ):
        return f"{type(conv).__name__} computes something of its own"
    if has_hooks(conv):
        return "it has hooks"
    if conv.padding_mode != "zeros":
        return f"it pads with {conv.padding_mode}"
    if padding_of(conv) is None:
        return "it pads one side more than the other"
    weight = conv._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(getattr(conv, 'weight', None)).__name__}"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}"
    return None


def why_not_norm(norm: nn.Module) -> str | None:
    """The reason to leave a batch norm alone."""
    if has_hooks(norm):
        return "its batch norm has hooks"
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return "its batch norm keeps no running statistics"
    if hasattr(norm, "parametrizations"):
        return "its batch norm is parametrized"
    return None


def why_not_norm_in_training(norm: nn.Module) -> str | None:
    """The reason to leave a batch norm alone in training mode."""
    if has_hooks(norm):
        return "it has hooks"
    if hasattr(norm, "parametrizations"):
        return "it is parametrized"
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):  # timm's BatchNormAct2d
        return "it drops something between norm and activation"
    return None


def channels_of(norm: nn.Module) -> int:
    """How many channels a batch norm normalises."""
    mean = getattr(norm, "running_mean", None)
    return norm.num_features if mean is None else mean.numel()  # type: ignore[return-value]


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """How the window of a convolution moves that there is no reason to leave alone."""
    padding = padding_of(conv)
    assert padding is not None
    (stride_h, stride_w), (dilation_h, dilation_w) = conv.stride, conv.dilation
    return Geometry((stride_h, stride_w), padding, (dilation_h, dilation_w), conv.groups)


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The zeros on either side, as numbers; None where the sides differ ("same", even kernels)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    assert not isinstance(conv.padding, str)
    return (conv.padding[0], conv.padding[1])


def is_norm(module: nn.Module) -> bool:
    """True for a batch norm over images, frozen ones and timm's batch norm + activation too."""
    if type(module).__name__ in FROZEN_NORMS:
        return True
    plain = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and (
        type(module).forward in plain or type(module).__name__ == "BatchNormAct2d"
    )


def activation_in_norm(norm: nn.Module) -> nn.Module | None:
    """What timm's BatchNormAct2d applies after normalising."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else None


def differs_in_training(module: nn.Module) -> bool:
    """True for a layer that computes something else in training mode."""
    if type(module).__name__ in FROZEN_NORMS:
        return False
    return is_norm(module) or (skips_in_eval(module) and not isinstance(module, nn.Identity))


def activation_of(module: nn.Module) -> str | None:
    """The name in ACTIVATIONS of a module; None if it is none of them, or has hooks."""
    names = {
        nn.Identity: "identity",
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.SiLU: "silu",
        nn.LeakyReLU: "leaky_relu",
        nn.PReLU: "prelu",
        nn.Hardswish: "hardswish",
    }
    name = names.get(type(module))
    return None if name is None or has_hooks(module) else name


def slope_of(act: nn.Module | None, channels: int) -> Slope:
    """The slope of LeakyReLU (a number) or PReLU (a tensor [channels]); else None."""
    if isinstance(act, nn.LeakyReLU):
        return float(act.negative_slope)
    if isinstance(act, nn.PReLU):
        weight: Tensor = act.weight.detach()
        return weight.expand(channels) if weight.numel() == 1 else weight
    return None


def skips_in_eval(module: nn.Module) -> bool:
    """True for what hands its input on in eval mode."""
    by_name = ("DropPath", "StochasticDepth", "DropBlock2d")
    return not has_hooks(module) and (
        isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
        or type(module).__name__ in by_name
    )
