"""Weights written to in every way people have: fused models answer with the new ones."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import resfuse.kernels.cpu.weight_origin as origin
from fuse_models import is_fused
from resfuse.kernels import fuse, unfuse
from resfuse.kernels.cpu.weight_digest import WINDOWS, Digest

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def plain(wide: int = 32) -> nn.Module:
    """No count of batches in the first half, and one in the second; 'wide' makes a large weight."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, wide, 3, padding=1),
        nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1, bias=False),
        nn.BatchNorm2d(wide), nn.ReLU(),
    ).eval()  # fmt: skip


def warm(model: nn.Module) -> nn.Module:
    """Fused, folded, and on its straight path."""
    model = fuse(model)
    with torch.no_grad():
        for _ in range(3):
            model(X)
    return model


def require_new(model: nn.Module, before: Tensor | None = None) -> None:
    """The same answer as the layers', which differ from what they were."""
    assert is_fused(model)
    layers = unfuse(copy.deepcopy(model)).eval()
    with torch.no_grad():
        wanted, got = layers(X), model(X)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    if before is not None:
        assert not torch.allclose(wanted, before, rtol=1e-3, atol=1e-3)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X).clone()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.5, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.05, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "AdamW fused, tiny steps": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, 0.5, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.05),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, training: bool) -> None:
    model = fuse(plain(), training=training)
    with torch.no_grad():
        model(X), model(X)
    before = answer(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    model.train()
    model(X).square().mean().backward()
    optimizer.step()
    require_new(model.eval(), before)
    before = answer(model)
    model(X).square().mean().backward()  # in eval mode, with no call that says that one trains
    optimizer.step()
    require_new(model, before)


@torch.no_grad()
def test_an_optimizer_that_writes_to_one_element_tells() -> None:
    """No sample sees that; the step's hook does, whatever torch counts."""
    model = warm(plain(96))
    weight = model[5].weight
    optimizer = torch.optim.SGD([weight], 1.0, fused=True)
    weight.grad = torch.zeros_like(weight)
    weight.grad[7, 9, 1, 1] = 50
    before = answer(model)
    optimizer.step()
    require_new(model, before)


def every(model: nn.Module, write: Callable[[Tensor], Any]) -> None:
    for parameter in model.parameters():
        write(parameter)


def _swap(model: nn.Module) -> None:
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        new = nn.Parameter(parameter.detach() * 0.7, requires_grad=False)
        torch.utils.swap_tensors(model.get_submodule(owner)._parameters[last], new)


def _through_numpy(model: nn.Module) -> None:
    every(model, lambda p: p.detach().numpy().__imul__(0.5))


def _assigned(model: nn.Module, times: int = 1) -> None:
    for _ in range(times):
        state = {k: v * 0.8 if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)


def _transposed(model: nn.Module) -> None:
    weight = model[5].weight
    weight.data = weight.data.transpose(2, 3)


def _shared_then_written(model: nn.Module) -> None:
    model.share_memory()
    answer(model)
    every(model, lambda p: p.data.mul_(0.5))


def _dlpack(model: nn.Module) -> None:
    every(model, lambda p: torch.from_dlpack(p.detach()).mul_(0.5))


def _data_replaced_twice(model: nn.Module) -> None:
    """Memory of the second may lie where the first one's did."""
    for factor in (0.5, 3.0):
        every(model, lambda p, f=factor: setattr(p, "data", p.data * f))


def _statistics(model: nn.Module) -> None:
    model[3].running_mean.data.add_(1)
    model[6].running_var.numpy().__imul__(4)


def _trained(model: nn.Module) -> None:
    model.train()
    with torch.no_grad():
        model(X * 3)
    model.eval()


def _norm_trained_alone(model: nn.Module) -> None:
    model[3].num_batches_tracked = None
    model[3].train()(torch.randn(4, model[3].num_features, 5, 5) * 3)
    model[3].eval()


def _under_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        every(model, lambda p: p.mul_(0.5))


def _moved_under_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.double()
        every(model, lambda p: p.mul_(0.5))
        model.float()
        every(model, lambda p: p.mul_(0.9))


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    ".data": lambda m: every(m, lambda p: p.data.mul_(0.5)),
    ".data.copy_": lambda m: every(m, lambda p: p.data.copy_(torch.randn(p.shape))),
    ".data.clamp_": lambda m: every(m, lambda p: p.data.clamp_(-0.01, 0.01)),
    ".data = new": lambda m: every(m, lambda p: setattr(p, "data", p.data * 0.5)),
    ".data = new, twice": _data_replaced_twice,
    ".data transposed": _transposed,
    ".data negated": lambda m: m[5].weight.data.neg_(),
    ".data flipped": lambda m: m[5].weight.data.copy_(m[5].weight.data.flip(0)),
    "detach": lambda m: every(m, lambda p: p.detach().mul_(0.5)),
    "numpy": _through_numpy,
    "dlpack": _dlpack,
    "one bias": lambda m: m[0].bias.data.__setitem__(3, 5.0),
    "one element of a small network": lambda m: m[0].weight.data[3, 1, 1].fill_(9.0),
    "setitem": lambda m: m[2].weight.detach().__setitem__(slice(None), 0.01),
    "statistics": _statistics,
    "train mode": _trained,
    "a norm trained by itself": _norm_trained_alone,
    "swap_tensors": _swap,
    "assign": _assigned,
    "assign, twice": lambda m: _assigned(m, 2),
    "shared memory": _shared_then_written,
    "inference mode": _under_inference_mode,
    "moved in inference mode": _moved_under_inference_mode,
    "a new parameter": lambda m: setattr(m[5], "weight", nn.Parameter(torch.randn(32, 32, 3, 3))),
    "a bias more": lambda m: setattr(m[5], "bias", nn.Parameter(torch.randn(32))),
    "a buffer": lambda m: setattr(m[3], "running_mean", torch.randn(32)),
    "reset": lambda m: m[3].reset_parameters(),
    "no gamma": lambda m: setattr(m[3], "weight", None),
    "to double and back": lambda m: every(m.double().float(), lambda p: p.data.mul_(0.5)),
    "channels_last": lambda m: every(
        m.to(memory_format=torch.channels_last), lambda p: p.data.mul_(0.5)
    ),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("native", [True, False], ids=["native", "no compiler"])
def test_writes(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(origin, "why_unavailable", lambda: "no compiler")
    model = warm(plain())
    with torch.no_grad():
        model[3].running_var.uniform_(0.5, 2)
        model[3].weight.uniform_(0.5, 2)
    before = answer(model)
    with torch.no_grad():
        WRITES[name](model)
    require_new(model, before)
    require_new(model)


def test_a_model_built_under_inference_mode_is_followed() -> None:
    with torch.inference_mode():
        layers = plain()
        for model in (fuse(layers), fuse(copy.deepcopy(layers), inplace=True)):
            model(X), model(X)
            before = model(X).clone()
            model[5].weight[3, 4, 1, 1] = 9.0
            wanted = unfuse(copy.deepcopy(model))(X)
            torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(wanted, before, atol=1e-3)


LATER: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda c: parametrizations.weight_norm(c),
    "old weight_norm": lambda c: nn.utils.weight_norm(c),
    "spectral_norm": lambda c: parametrizations.spectral_norm(c),
    "orthogonal": lambda c: parametrizations.orthogonal(c),
    "parametrization": lambda c: parametrize.register_parametrization(c, "weight", nn.Tanh()),
    "prune": lambda c: prune.l1_unstructured(c, "weight", 0.5),
}


@pytest.mark.parametrize("name", LATER)
def test_what_is_registered_later_runs(name: str) -> None:
    model = warm(plain())
    LATER[name](model[5])
    require_same_as_layers(model)
    with torch.no_grad():
        for parameter in model[5].parameters():
            parameter.mul_(1.5)
    require_same_as_layers(model)


def require_same_as_layers(model: nn.Module) -> None:
    with torch.no_grad():
        wanted = X
        for layer in model:
            wanted = layer(wanted)
        torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


def test_prune_and_its_removal() -> None:
    model = warm(plain())
    prune.random_unstructured(model[5], "weight", 0.5)
    require_same_as_layers(model)
    prune.remove(model[5], "weight")
    require_new(model)
    with torch.no_grad():
        model[5].weight.mul_(2)
    require_new(model)


def test_a_weight_that_is_a_plain_tensor() -> None:
    model = warm(plain())
    del model[5].weight
    model[5].weight = torch.randn(32, 32, 3, 3)
    require_same_as_layers(model)
    model[5].weight.mul_(2)
    require_same_as_layers(model)


def test_statistics_that_are_gone_are_the_batchs() -> None:
    model = warm(plain())
    model[3].running_mean = model[3].running_var = None
    require_same_as_layers(model)


def test_functional_call() -> None:
    model = warm(plain())
    before = answer(model)
    parameters = {k: torch.randn_like(v) * 0.1 for k, v in model.named_parameters()}
    with torch.no_grad():
        got = functional_call(model, parameters, (X,))
        wanted = functional_call(unfuse(copy.deepcopy(model)), parameters, (X,))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(model), before)


def test_another_process_writes() -> None:
    model = plain().share_memory()
    fused = fuse(model, inplace=True)
    before = answer(fused)
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=halve, args=(fused[5].weight,))
    process.start()
    process.join()
    assert process.exitcode == 0
    require_new(fused, before)


def halve(weight: Tensor) -> None:
    weight.data.mul_(0.5)


def test_every_byte_of_a_large_network_is_seen_in_time() -> None:
    """One element of 2.4 million, written past all counts: at the latest after so many calls."""
    weights = [torch.randn(512, 512, 3, 3), torch.randn(64)]
    digest = Digest(weights)
    assert all(digest.seems_unchanged() for _ in range(3 * WINDOWS))
    weights[0].numpy()[300, 17, 1, 2] += 1
    assert not digest.is_unchanged()
    assert not all(digest.seems_unchanged() for _ in range(WINDOWS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, 7, 63, 64, 257, 4097])
def test_a_digest_sees_every_byte(size: int, dtype: torch.dtype) -> None:
    tensor = torch.zeros(size, dtype=dtype)
    digest = Digest([tensor])
    flat = tensor.view(torch.uint8)
    for at in range(0, len(flat), max(1, len(flat) // 97)):
        flat[at] += 1
        assert not digest.seems_unchanged()
        flat[at] -= 1
        assert digest.seems_unchanged()


def test_a_sample_sees_whole_filters_and_channels() -> None:
    for shape in ((64, 64, 3, 3), (32, 512, 3, 3)):
        weight = torch.randn(shape)
        digest = Digest([weight, torch.zeros(1 << 20)])
        digest._window = 0  # by the sample alone
        for k in range(32 * (shape[0] == 32)):
            weight.data[k] += 1
            assert not digest.seems_unchanged()
            weight.data[k] -= 1
            digest = Digest([weight, torch.zeros(1 << 20)])
            digest._window = 0


def test_frozen_weights_are_not_looked_at() -> None:
    model = fuse(plain(), weights="frozen")
    before = answer(model)
    model[5].weight.data.mul_(0.5)
    assert torch.equal(answer(model), before)
    require_new(model.eval(), before)
    before = answer(model)
    model.load_state_dict(plain(32).state_dict())
    require_new(model, before)
    assert copy.deepcopy(model)[0].weight is not None
    twin = copy.deepcopy(model)
    before = answer(twin)
    twin[5].weight.data.mul_(0.5)
    assert torch.equal(answer(twin), before)
    with pytest.raises(ValueError, match="argument weights"):
        fuse(plain(), weights="frosen")


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "state_dict": lambda m: m.state_dict(),
    "a layer's state_dict": lambda m: m[0].state_dict(),
    "load_state_dict": lambda m: m.load_state_dict(plain().state_dict()),
    "a layer's load_state_dict": lambda m: m[0].load_state_dict(plain()[0].state_dict()),
    "cpu": lambda m: m.cpu(),
    "to": lambda m: m.to("cpu"),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "share_memory": lambda m: m.share_memory(),
    "deepcopy": copy.deepcopy,
    "unfuse": unfuse,
    "train": lambda m: m.train()(X),
    "parent": lambda m: nn.Sequential(m).state_dict(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_models_without_weights_refuse(name: str) -> None:
    model = fuse(plain(), discard_weights=True)
    before = answer(model)
    answer(model)
    with pytest.raises(RuntimeError, match="discard_weights"):
        REFUSED[name](model)
    torch.testing.assert_close(answer(model.eval()), before)


def test_a_norm_written_to_after_its_convolution_was_discarded_is_no_silent_error() -> None:
    model = fuse(plain(), discard_weights=True)
    answer(model)
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="discard_weights"):
        answer(model)


def test_the_hook_on_optimizers_is_registered_by_the_first_fuse_only() -> None:
    code = (
        "import torch, resfuse.kernels as k; from torch.optim import optimizer as o;"
        "assert not o._global_optimizer_post_hooks;"
        "m = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU()).eval();"
        "k.fuse(m); k.fuse(m); assert len(o._global_optimizer_post_hooks) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
