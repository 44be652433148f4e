"""What fuse() takes a module for: a convolution, a batch norm, an activation, and why not."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from resfuse.kernels.activation import Slope
from resfuse.kernels.onednn import Geometry
from resfuse.kernels.scope import has_hooks, original_class

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONV_METHODS = ("forward", "_conv_forward", "__call__")
FROZEN_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision, detectron2; timm


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, but for what cannot be copied: the process groups of its SyncBatchNorms."""
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    groups = [norm.process_group for norm in norms if norm.process_group is not None]
    twin = deepcopy(model, {id(group): group for group in groups})
    for module, copy in zip(model.modules(), twin.modules(), strict=True):
        copy.training = module.training  # a copy of a GraphModule is always in training mode
    return twin


def why_not_conv(conv: nn.Conv2d) -> str | None:
    """The reason to leave a convolution alone; None where there is none."""
    if hasattr(conv, "parametrizations"):
        return "its weight is parametrized"
    own = [getattr(type(conv), name) is not getattr(nn.Conv2d, name) for name in _CONV_METHODS]
    if any(own) or "_conv_forward" in vars(conv):
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
    kind = original_class(module)
    if kind.__name__ in FROZEN_NORMS:
        return _is_from(kind, "timm", "torchvision", "detectron2")
    plain = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and (
        kind.forward in plain or (kind.__name__ == "BatchNormAct2d" and _is_from(kind, "timm"))
    )


def activation_in_norm(norm: nn.Module) -> nn.Module | None:
    """What timm's BatchNormAct2d applies after normalising."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else None


def differs_in_training(module: nn.Module) -> bool:
    """True for a layer that computes something else in training mode."""
    if is_norm(module) and original_class(module).__name__ in FROZEN_NORMS:
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
    """True for what hands its input on in eval mode, as far as its class tells."""
    if has_hooks(module):
        return False
    kind = original_class(module)
    if type(module).__name__ in ("DropPath", "StochasticDepth", "DropBlock2d"):
        return _is_from(kind, "timm", "torchvision")
    return isinstance(module, _SKIPPED) and kind.forward in [skip.forward for skip in _SKIPPED]


_SKIPPED = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip


def _is_from(kind: type, *packages: str) -> bool:
    """Whether a class is one of a package's own; others use its names for things of their own."""
    return kind.__module__.partition(".")[0] in packages
