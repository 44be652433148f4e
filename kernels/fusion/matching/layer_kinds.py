"""What fuse() takes a module for: a convolution, a batch norm, an activation, and why not."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from resfuse.kernels.fusion.tracing.module_tracing import has_hooks, original_class
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.bn_folding import bn_scale_shift
from resfuse.kernels.ops.conv_problem import Geometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONV_METHODS = ("forward", "_conv_forward", "__call__")
FROZEN_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision, detectron2; timm
ACTIVATING_NORMS = ("BatchNormAct2d", "FrozenBatchNormAct2d")  # timm's, which apply self.act


def copied(model: nn.Module) -> nn.Module:
    """Returns a deep copy that shares the process groups of SyncBatchNorms, which cannot be
    copied."""
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    groups = [norm.process_group for norm in norms if norm.process_group is not None]
    with torch.inference_mode(False):  # nothing would count the writes to inference tensors
        twin = deepcopy(model, {id(group): group for group in groups})
    for module, copy in zip(model.modules(), twin.modules(), strict=True):
        copy.training = module.training  # a copy of a GraphModule is always in training mode
    return twin


def why_not_conv(conv: nn.Conv2d) -> str | None:
    """Returns the reason not to fuse a convolution, None without one."""
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
    if conv.padding == "same" and set(conv.stride) != {1}:
        return "torch has no strided convolution whose padding is same"
    weight = conv._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(getattr(conv, 'weight', None)).__name__}"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}"
    return None


def why_not_norm(norm: nn.Module) -> str | None:
    """Returns the reason not to fuse a batch norm, None without one."""
    if has_hooks(norm):
        return "its batch norm has hooks"
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return "its batch norm keeps no running statistics"
    if hasattr(norm, "parametrizations"):
        return "its batch norm is parametrized"
    if not _computes_as_named(norm):
        return f"its batch norm, {type(norm).__name__}, computes something of its own"
    return None


@torch.no_grad()
def _computes_as_named(norm: nn.Module) -> bool:
    """Returns whether a norm that goes by its class's name computes what the class of that name
    does: many projects have a FrozenBatchNorm2d of their own, with another eps or none. torch's are
    known."""
    if _is_torchs(norm):
        return True
    eps, mean = getattr(norm, "eps", None), norm.running_mean
    if not isinstance(eps, float | int) or not isinstance(mean, Tensor) or mean.dim() != 1:
        return False
    drop, act = getattr(norm, "drop", None), activation_in_norm(norm)
    if isinstance(drop, nn.Module) and not skips_in_eval(drop):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, len(mean), 2, 3, generator=generator, dtype=torch.float64, device="cpu")
    x = x.to(mean)
    scale, shift = bn_scale_shift(norm)  # type: ignore[arg-type]
    wide = x.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    try:
        expected = wide if act is None else act.forward(wide.clone().to(mean))
        got = norm.forward(x.clone())
    except Exception:  # foreign code may raise anything: then it is not what it is named after
        return False
    largest = wide.nan_to_num(0, 0, 0).abs().amax().item()
    tolerance = 16 * torch.finfo(mean.dtype).eps * max(largest, 1e-30)
    return got.shape == x.shape and torch.allclose(
        got.double(), expected.double(), rtol=0, atol=tolerance, equal_nan=True
    )


def why_not_norm_in_training(norm: nn.Module) -> str | None:
    """Returns the reason not to fuse a batch norm in training mode, None without one."""
    if has_hooks(norm):
        return "it has hooks"
    if hasattr(norm, "parametrizations"):
        return "it is parametrized"
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):  # timm's BatchNormAct2d
        return "it drops something between norm and activation"
    return None


def channels_of(norm: nn.Module) -> int:
    """Returns the number of channels that a batch norm normalises."""
    mean = getattr(norm, "running_mean", None)
    return norm.num_features if mean is None else mean.numel()  # type: ignore[return-value]


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """Returns the geometry of a convolution that can be fused."""
    padding = padding_of(conv)
    assert padding is not None
    (stride_h, stride_w), (dilation_h, dilation_w) = conv.stride, conv.dilation
    return Geometry((stride_h, stride_w), padding, (dilation_h, dilation_w), conv.groups)


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Returns the zeros on either side, as numbers; None where the sides differ ("same", even
    kernels)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    assert not isinstance(conv.padding, str)
    return (conv.padding[0], conv.padding[1])


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a batch norm over images, frozen or timm's batch norm +
    activation included."""
    kind = original_class(module)
    if kind.__name__ in FROZEN_NORMS:
        return True
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and (
        _is_torchs(module) or (kind.__name__ == "BatchNormAct2d" and _is_from(kind, "timm"))
    )


def _is_torchs(norm: nn.Module) -> bool:
    return original_class(norm).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def activation_in_norm(norm: nn.Module) -> nn.Module | None:
    """Returns the activation that the norm's own forward applies, as timm's do; None where it
    applies none: torch's batch norm does not look at an attribute `act` that was given to it, and
    timm's `apply_act=False` puts an Identity there."""
    act = getattr(norm, "act", None)
    if original_class(norm).__name__ not in ACTIVATING_NORMS or not isinstance(act, nn.Module):
        return None
    return None if type(act) is nn.Identity and not has_hooks(act) else act


def differs_in_training(module: nn.Module) -> bool:
    """Returns whether a layer computes something else in training mode."""
    if is_norm(module) and original_class(module).__name__ in FROZEN_NORMS:
        return False
    return is_norm(module) or (skips_in_eval(module) and not isinstance(module, nn.Identity))


def activation_of(module: nn.Module) -> str | None:
    """Returns the name in ACTIVATIONS of a module; None if it is none of them, or has hooks."""
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
    if type(module) is nn.GELU:
        name = GELU_FORMS.get(module.approximate)
    return None if name is None or has_hooks(module) else name


GELU_FORMS = {"none": "gelu", "tanh": "gelu_tanh"}  # torch's `approximate` -> our name


def slope_of(act: nn.Module | None, channels: int) -> Slope:
    """Returns the slope of LeakyReLU (a number) or PReLU (a tensor [channels]); else None."""
    if isinstance(act, nn.LeakyReLU):
        return float(act.negative_slope)
    if isinstance(act, nn.PReLU):
        weight: Tensor = act.weight.detach()
        return weight.expand(channels) if weight.numel() == 1 else weight
    return None


def skips_in_eval(module: nn.Module) -> bool:
    """Returns whether a module of such a class returns its input in eval mode."""
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
    """Returns whether a class is one of a package's own; others use its names for things of their
    own."""
    return kind.__module__.partition(".")[0] in packages
