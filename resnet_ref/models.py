"""The registry: every network by name. A new one is a factory and one line in IMAGENET or CIFAR."""

import contextlib
import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from resfuse.resnet_ref.cifar import (
    cifar_plain,
    cifar_preact,
    cifar_resnet,
    cifar_resnext,
    cifar_wrn,
)
from resfuse.resnet_ref.resnet import plain, preact_resnet, resnet
from resfuse.resnet_ref.vgg import VGG

# A factory takes num_classes and features_only by keyword and draws its weights from the global
# generator. The names without suffix are torchvision's: v1.5 and shortcut option B.
IMAGENET: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(resnet, 18),
    "resnet34": partial(resnet, 34),
    "resnet50": partial(resnet, 50),
    "resnet101": partial(resnet, 101),
    "resnet152": partial(resnet, 152),
    "resnet18_v1": partial(resnet, 18),  # no bottleneck: v1 and v1.5 are one network
    "resnet34_v1": partial(resnet, 34),
    "resnet50_v1": partial(resnet, 50, stride_in_1x1=True),
    "resnet101_v1": partial(resnet, 101, stride_in_1x1=True),
    "resnet152_v1": partial(resnet, 152, stride_in_1x1=True),
    "resnet18_a": partial(resnet, 18, shortcut="A"),
    "resnet34_a": partial(resnet, 34, shortcut="A"),
    "resnet18_c": partial(resnet, 18, shortcut="C"),
    "resnet34_c": partial(resnet, 34, shortcut="C"),
    "plain18": partial(plain, 18),
    "plain34": partial(plain, 34),
    "resnext50_32x4d": partial(resnet, 50, groups=32, base_width=4),
    "resnext101_32x8d": partial(resnet, 101, groups=32, base_width=8),
    "resnext101_64x4d": partial(resnet, 101, groups=64, base_width=4),
    "wide_resnet50_2": partial(resnet, 50, base_width=128),
    "wide_resnet101_2": partial(resnet, 101, base_width=128),
    "preact_resnet200": partial(preact_resnet, 200),
    "vgg19": partial(VGG, batch_norm=False),
    "vgg19_bn": partial(VGG, batch_norm=True),
}
# Here the names without suffix are the paper's: shortcut option A.
CIFAR: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": partial(cifar_resnet, 20),
    "cifar_resnet32": partial(cifar_resnet, 32),
    "cifar_resnet44": partial(cifar_resnet, 44),
    "cifar_resnet56": partial(cifar_resnet, 56),
    "cifar_resnet110": partial(cifar_resnet, 110),
    "cifar_resnet1202": partial(cifar_resnet, 1202),
    "cifar_resnet20_b": partial(cifar_resnet, 20, shortcut="B"),
    "cifar_resnet32_b": partial(cifar_resnet, 32, shortcut="B"),
    "cifar_resnet44_b": partial(cifar_resnet, 44, shortcut="B"),
    "cifar_resnet56_b": partial(cifar_resnet, 56, shortcut="B"),
    "cifar_resnet110_b": partial(cifar_resnet, 110, shortcut="B"),
    "cifar_resnet1202_b": partial(cifar_resnet, 1202, shortcut="B"),
    "cifar_resnet20_c": partial(cifar_resnet, 20, shortcut="C"),
    "cifar_resnet32_c": partial(cifar_resnet, 32, shortcut="C"),
    "cifar_resnet44_c": partial(cifar_resnet, 44, shortcut="C"),
    "cifar_resnet56_c": partial(cifar_resnet, 56, shortcut="C"),
    "cifar_resnet110_c": partial(cifar_resnet, 110, shortcut="C"),
    "cifar_resnet1202_c": partial(cifar_resnet, 1202, shortcut="C"),
    "cifar_plain20": partial(cifar_plain, 20),
    "cifar_plain32": partial(cifar_plain, 32),
    "cifar_plain44": partial(cifar_plain, 44),
    "cifar_plain56": partial(cifar_plain, 56),
    "cifar_plain110": partial(cifar_plain, 110),
    "cifar_preact164": partial(cifar_preact, 164),
    "cifar_preact1001": partial(cifar_preact, 1001),
    "cifar_wrn28_10": partial(cifar_wrn, 28, widen=10),
    "cifar_resnext29_8x64d": partial(cifar_resnext, 29, groups=8, base_width=64),
}
MODELS: dict[str, Callable[..., nn.Module]] = IMAGENET | CIFAR


def input_size(name: str) -> int:
    """Side of the square images a network is meant for, in pixels."""
    _check_known(name)
    return 32 if name in CIFAR else 224


def num_classes(name: str) -> int:
    """Outputs a network has unless `create` is told otherwise."""
    _check_known(name)
    return 10 if name in CIFAR else 1000


def create(
    name: str,
    num_classes: int | None = None,
    features_only: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Builds a network, in training mode, with random weights that depend on `seed` alone.

    The weights are drawn on the CPU, so they are the same on every device and, for the networks
    that torchvision has, those torchvision draws after torch.manual_seed(seed). No generator that
    the caller may be using is disturbed.

    Args:
        name: a key of MODELS.
        num_classes: outputs; None for the default, see num_classes(name).
        features_only: return the list of feature maps (strides 4, 8, 16, 32; CIFAR networks 1, 2,
            4) and leave the head out; `.feature_info` lists num_chs, reduction, module of each.
        seed: of the initialisation.
        device: None for torch's default device. "meta" allocates nothing.

    Raises:
        ValueError: unknown name, or num_classes below 1.
    """
    _check_known(name)
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; accepted: 1 or more")
    device = torch.get_default_device() if device is None else torch.device(device)
    # Only what differs from the default is passed: a factory need not know what it does not offer.
    options: dict[str, object] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if features_only:
        options["features_only"] = True
    on_meta = device.type == "meta"
    drawing = _Undrawn() if on_meta else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"), drawing:
        # torch.manual_seed would reseed every GPU too, which no fork here would undo.
        torch.default_generator.manual_seed(seed)
        model = MODELS[name](**options)
    return model.to(device)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors of the meta device, which have no numbers, without any: drawing them goes
    through torch's Python references, and takes longer than all else.
    """

    _DRAWS = frozenset((torch.Tensor.normal_, nn.init.kaiming_uniform_, nn.init.uniform_))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_known(name: str) -> None:
    if name in MODELS:
        return
    close = difflib.get_close_matches(name, MODELS, n=3)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise ValueError(f"unknown model {name!r}; {hint}known: {', '.join(MODELS)}")
