"""What people do to models after they were made: name -> (the kind of module it is done to, what is
done, given the model and that module's name).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import swap_tensors

from habits import CHANNELS, FLAGS, Base, Block, Config, DropPath, Gate


def replaced(model: nn.Module, name: str, new: nn.Module) -> None:
    outer, _, last = name.rpartition(".")
    setattr(model.get_submodule(outer), last, new)


def another_conv(model: nn.Module, name: str) -> None:
    replaced(model, name, nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2).eval())


def stepped(
    model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any
) -> None:
    """A step of an optimizer; torch does not count what fused ones write."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    kind(model.parameters(), lr=0.05, **options).step()  # type: ignore[call-arg]
    model.zero_grad()


def written_in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.mul_(1.5)


def made_in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)


def loaded(model: nn.Module, assign: bool) -> None:
    state = {k: v * 1.25 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def a_hook(m: nn.Module, args: Any, y: Any) -> Any:
    return y * 1.5 if isinstance(y, Tensor) else None


def a_pre_hook(m: nn.Module, args: Any) -> Any:
    return (args[0] * 1.5,) if args and isinstance(args[0], Tensor) else None


def hook_with_keywords(m: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
    return y + 1 if isinstance(y, Tensor) else None


def hooked_with_keywords(layer: nn.Module) -> None:
    layer.register_forward_hook(hook_with_keywords, with_kwargs=True)


def restrided(layer: Any) -> None:
    layer.weight.data = layer.weight.data.mT.contiguous().mT


def shifted(layer: nn.Module) -> None:
    if isinstance(bias := getattr(layer, "bias", None), Tensor):
        bias.data.add_(0.1)


def pruned_for_good(layer: nn.Module) -> None:
    prune.remove(prune.l1_unstructured(layer, "weight", 0.4), "weight")


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def parametrized_once(layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        return  # torch would take the weight from all copies: they share a class
    parametrized(layer)
    parametrize.remove_parametrizations(layer, "weight")


def on(change: Callable[[Any], object]) -> Callable[[nn.Module, str], object]:
    """A change of the module itself, which does not ask what it is called."""
    return lambda model, name: change(model.get_submodule(name))


Change = tuple[type, Callable[[Any, str], object]]
CONV, BN, RELU, MODULE = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Module
CHANGES: dict[str, Change] = {
    # attributes
    "flag": (Base, on(lambda m: setattr(m, "flag", False))),
    "number": (Base, on(lambda m: setattr(m, "number", 2.5))),
    "number by its dict": (Base, on(lambda m: vars(m).update(number=1.5))),
    "object": (Base, on(lambda m: setattr(m.config, "gain", 0.5))),
    "another object": (Base, on(lambda m: setattr(m, "config", Config()))),
    "table": (Base, on(lambda m: m.table.update(gain=1.5))),
    "no key": (Base, on(lambda m: m.table.clear())),
    "optional": (Base, on(lambda m: setattr(m, "optional", nn.Tanh()))),
    "tensor": (Base, on(lambda m: setattr(m, "tensor", torch.ones(1) * 3))),
    "tensor in place": (Base, on(lambda m: m.tensor.mul_(2))),
    "no attribute": (Base, on(lambda m: delattr(m, "number"))),
    "class": (Base, on(lambda m: setattr(type(m), "gain_of_class", 3.0))),
    "own forward": (RELU, on(lambda m: setattr(m, "forward", torch.tanh))),
    "another class": (RELU, on(lambda m: setattr(m, "__class__", nn.Hardswish))),
    "global": (Base, lambda model, name: FLAGS.update(on=False)),
    "residual": (Block, on(lambda m: setattr(m, "residual", False))),
    "path": (DropPath, on(lambda m: setattr(m, "scale", 0.5))),
    "gate": (Gate, on(lambda m: setattr(m, "in_place", not m.in_place))),
    "eps": (BN, on(lambda m: setattr(m, "eps", 0.3))),
    "stride": (CONV, on(lambda m: setattr(m, "stride", (2, 2)))),
    "padding": (CONV, on(lambda m: setattr(m, "padding", (0, 0)))),
    "padding mode": (CONV, on(lambda m: setattr(m, "padding_mode", "reflect"))),
    "in place": (RELU, on(lambda m: setattr(m, "inplace", not m.inplace))),
    # modules
    "relu": (RELU, lambda model, name: replaced(model, name, nn.Sigmoid())),
    "norm": (BN, lambda model, name: replaced(model, name, nn.Identity())),
    "another norm": (BN, lambda model, name: replaced(model, name, nn.GroupNorm(2, CHANNELS))),
    "another conv": (CONV, another_conv),
    "longer": (nn.Sequential, on(lambda m: m.append(nn.Tanh()))),
    "shorter": (nn.Sequential, on(lambda m: m.pop(-1))),
    "more": (nn.ModuleList, on(lambda m: m.append(Block(True).eval()))),
    "train": (Base, on(lambda m: m.train())),
    "eval": (Base, on(lambda m: m.eval())),
    "train one": (MODULE, on(lambda m: m.train())),
    # hooks
    "hook": (MODULE, on(lambda m: m.register_forward_hook(a_hook))),
    "hook of a norm": (BN, on(lambda m: m.register_forward_hook(a_hook))),
    "pre-hook": (CONV, on(lambda m: m.register_forward_pre_hook(a_pre_hook))),
    "keyword hook": (BN, on(hooked_with_keywords)),
    "backward hook": (CONV, on(lambda m: m.register_full_backward_hook(lambda *_: None))),
    "removed hook": (BN, on(lambda m: m.register_forward_hook(a_hook).remove())),
    "hook of a weight": (CONV, on(lambda m: m.weight.register_hook(lambda g: g * 2))),
    # weights
    "data": (CONV, on(lambda m: m.weight.data.mul_(1.5))),
    "one number": (CONV, on(lambda m: m.weight.data.view(-1)[3].add_(0.5))),
    "other data": (CONV, on(lambda m: setattr(m.weight, "data", m.weight.data * 1.5))),
    "other strides": (CONV, on(restrided)),
    "set": (CONV, on(lambda m: m.weight.data.set_(m.weight.data * 1.5))),
    "numpy": (CONV, on(lambda m: m.weight.detach().numpy().__imul__(1.5))),
    "another weight": (CONV, on(lambda m: setattr(m, "weight", nn.Parameter(m.weight.data * 1.5)))),
    "bias": (CONV, on(lambda m: m.bias.data.add_(0.5))),
    "no bias": (CONV, on(lambda m: setattr(m, "bias", None))),
    "statistics": (BN, on(lambda m: m.running_mean.add_(0.5))),
    "statistics by numpy": (BN, on(lambda m: m.running_var.numpy().__imul__(2))),
    "other statistics": (BN, on(lambda m: setattr(m, "running_mean", m.running_mean + 0.5))),
    "no statistics": (BN, on(lambda m: setattr(m, "running_mean", None))),
    "no variance": (BN, on(lambda m: m.running_var.zero_())),
    "negative variance": (BN, on(lambda m: m.running_var.neg_())),
    "reset": (BN, on(lambda m: m.reset_parameters())),
    "nan": (CONV, on(lambda m: m.weight.data[0, 0].fill_(float("nan")))),
    "fused SGD": (Base, on(lambda m: stepped(m, fused=True))),
    "fused Adam": (Base, on(lambda m: stepped(m, torch.optim.Adam, fused=True))),
    "AdamW at once": (Base, on(lambda m: stepped(m, torch.optim.AdamW, foreach=True))),
    "SGD": (Base, on(stepped)),
    "inference mode": (CONV, on(written_in_inference_mode)),
    "of inference mode": (CONV, on(made_in_inference_mode)),
    "load": (Base, on(lambda m: loaded(m, assign=False))),
    "assign": (Base, on(lambda m: loaded(m, assign=True))),
    "swap": (CONV, on(lambda m: swap_tensors(m.weight, nn.Parameter(m.weight.data * 1.5)))),
    "shared memory": (Base, on(lambda m: m.share_memory())),
    "apply": (Base, on(lambda m: m.apply(shifted))),
    "freeze": (Base, on(lambda m: m.requires_grad_(False))),
    "prune": (CONV, on(lambda m: prune.l1_unstructured(m, "weight", 0.4))),
    "pruned for good": (CONV, on(pruned_for_good)),
    "parametrize": (CONV, on(parametrized)),
    "parametrized once": (CONV, on(parametrized_once)),
    "weight norm": (CONV, on(lambda m: parametrizations.weight_norm(m))),
    "channels last": (Base, on(lambda m: m.to(memory_format=torch.channels_last))),
    "a conv in channels last": (CONV, on(lambda m: m.to(memory_format=torch.channels_last))),
    "double": (Base, on(lambda m: m.double())),
    "half": (Base, on(lambda m: m.half())),
    "bfloat16": (Base, on(lambda m: m.bfloat16())),
    "a norm in double": (BN, on(lambda m: m.double())),
}  # fmt: skip
