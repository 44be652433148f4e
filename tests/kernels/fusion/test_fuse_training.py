"""fuse(model, training=True) on a CPU: torch's own training, bit by bit."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from resfuse.kernels import FusedBottleneck, explain, fuse, unfuse
from resfuse.kernels.fusion.planning.plan import plan_of
from training_models import Pair, images, network, require_same_training, steps_in, train_step

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "make",
    [
        network,
        lambda: network(resnet.Bottleneck, groups=4, width_per_group=4),
        lambda: network(FusedBottleneck),
        lambda: network(norm_layer=lambda c: nn.BatchNorm2d(c, momentum=None)),
        lambda: network(norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Pair(nn.BatchNorm2d(4, affine=False))),
        lambda: network().to(memory_format=torch.channels_last),
    ],
    ids=["basic", "resnext", "our blocks", "cumulative", "untracked", "no affine", "nhwc"],
)
def test_training_is_torchs(make: Callable[[], nn.Module]) -> None:
    model = make()
    require_same_training(model, fuse(model, training=True))


@pytest.mark.parametrize(
    "name", ["densenet121", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf"]
)
def test_other_networks_train_the_same(name: str) -> None:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=4).train()
    fused = fuse(model, training=True)
    assert steps_in(fused)
    answers = []
    for one in (model, fused):
        torch.manual_seed(0)  # dropout draws the same
        answers.append(train_step(one, images(size=64)))
    assert torch.equal(*answers)
    for (name, p), q in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name  # type: ignore[arg-type]


def test_timms_norms_with_activations() -> None:
    import timm

    model = timm.create_model("regnetx_002", num_classes=4).train()
    require_same_training(model, fuse(model, training=True), images(size=32))


@pytest.mark.parametrize(
    "act", [nn.SiLU(), nn.LeakyReLU(0.2), nn.PReLU(4), nn.Hardswish(), nn.GELU()]
)
def test_other_activations(act: nn.Module) -> None:
    model = Pair(nn.BatchNorm2d(4), act)
    require_same_training(model, fuse(model, training=True), torch.randn(2, 4, 5, 5))


def test_names_states_and_optimizers_stay() -> None:
    model = network()
    fused = fuse(model, training=True)
    assert list(fused.state_dict()) == list(model.state_dict())
    optimizer = torch.optim.SGD(fused.parameters(), 0.1, momentum=0.9)
    x = images()
    train_step(fused, x)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(fused.state_dict(), strict=True)
    other = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    other.load_state_dict(state)
    for one, its in ((fused, optimizer), (model, other)):
        its.zero_grad()
        train_step(one, x)
        its.step()
    for p, q in zip(model.parameters(), fused.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_after_training_uses_the_new_statistics(training: bool) -> None:
    """Without gradients, as when statistics are gathered anew: no weight has changed."""
    model = network()
    fused = fuse(model, training=training)
    x = images()
    with torch.no_grad():
        before = fused.eval()(x)
        for one in (model, fused):
            one.train()(x)
            one.eval()
        assert not torch.allclose(fused(x), before, atol=1e-3)
        assert torch.allclose(fused(x), model(x), atol=1e-4)


def test_no_folded_weights_are_kept_while_training() -> None:
    """They would be a second copy of the weights."""
    fused = fuse(network(), training=True)

    def kept() -> int:
        plans = [plan for m in fused.modules() if (plan := plan_of(m)) is not None]
        return sum(layer.fold.made is not None for plan in plans for layer in plan.layers)

    assert kept() == 0
    x = images()
    with torch.no_grad():
        fused.eval()(x)
        assert kept() > 0
        fused.train()(x)
        assert kept() == 0
        want = unfuse(copy.deepcopy(fused)).eval()(x)
        assert torch.allclose(fused.eval()(x), want, atol=1e-4)


def test_unfuse_takes_it_back() -> None:
    model = network()
    fused = fuse(model, training=True)
    train_step(fused, images())
    unfuse(fused)
    assert not steps_in(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_fused(how: Callable[[nn.Module], nn.Module]) -> None:
    fused = fuse(network(), training=True)
    copied = how(fused)
    assert steps_in(copied) == steps_in(fused)
    require_same_training(unfuse(copy.deepcopy(fused)), copied)


def test_without_asking_nothing_is_fused_in_training() -> None:
    assert not steps_in(fuse(network()))


def test_frozen_norms_are_affine() -> None:
    model = network()
    model.layer1.eval()
    for norm in (m for m in model.layer2.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    fused = fuse(model, training=True)
    assert not fused.layer2[0].bn1.training
    before = fused.layer2[0].bn1.running_mean.clone()
    require_same_training(model, fused)
    assert torch.equal(before, fused.layer2[0].bn1.running_mean)
    frozen = network(norm_layer=FrozenBatchNorm2d)
    require_same_training(frozen, fuse(frozen, training=True))


def test_gradient_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(
                self.inner.layer1, self.inner.bn1(self.inner.conv1(x)), use_reentrant=False
            )
            return x.mean((2, 3))

    model = Checkpointed(network())
    require_same_training(model, fuse(model, training=True))


def test_autocast() -> None:
    model = network()
    fused = fuse(model, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        require_same_training(model, fused)
    assert fused.bn1.running_mean.dtype == torch.float32


def test_second_derivatives_are_there_on_a_cpu() -> None:
    model = Pair(nn.BatchNorm2d(4))
    fused = fuse(model, training=True)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    found = []
    for one in (model, fused):
        (grad,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert torch.equal(*found)


def test_a_single_value_gets_torchs_error() -> None:
    fused = fuse(Pair(nn.BatchNorm2d(4)), training=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused(torch.randn(1, 4, 1, 1))


# What is left alone


@pytest.mark.parametrize("place", ["conv", "norm", "act"])
def test_hooks_fire(place: str) -> None:
    fused = fuse(Pair(nn.BatchNorm2d(4)), training=True)
    seen = []
    fused.get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
    fused(torch.randn(2, 4, 5, 5))
    assert seen == [place]


def test_a_layer_replaced_later_is_used() -> None:
    fused = fuse(Pair(nn.BatchNorm2d(4)), training=True)
    fused.norm = nn.GroupNorm(2, 4)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(fused(x), F.relu(fused.norm(fused.conv(x)) + x))


def test_a_forward_that_tosses_a_coin_is_left() -> None:
    class Coin(Pair):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and random.random() < 0.5:
                return x
            return super().forward(x)

    state = random.getstate()
    fused = fuse(Coin(nn.BatchNorm2d(4)), training=True)
    assert random.getstate() == state
    assert not steps_in(fused)
    x = torch.randn(2, 4, 5, 5)
    assert {torch.equal(fused(x), x) for _ in range(40)} == {True, False}


def no_grad(module: Pair, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = module.norm(module.conv(x))
    return module.act(x)


def other_precision(module: Pair, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = module.norm(module.conv(x))
    return module.act(x)


class Doubled(torch.autograd.Function):
    """Of which a graph would keep the forward and lose the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def own_gradient(module: Pair, x: Tensor) -> Tensor:
    return module.act(module.norm(Doubled.apply(module.conv(x))))


def offloads(module: Pair, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return module.act(module.norm(module.conv(x)))


@pytest.mark.parametrize("forward", [no_grad, other_precision, own_gradient, offloads])
def test_forwards_whose_gradients_a_graph_would_change_are_left(forward: Any) -> None:
    model = type("Odd", (Pair,), {"forward": forward})(nn.BatchNorm2d(4))
    fused = fuse(nn.Sequential(model, Pair(nn.BatchNorm2d(4))), training=True)
    assert steps_in(fused[1]) and not steps_in(fused[0])
    reasons = [reason for _, reason in explain(fused).left_in_training]
    assert reasons and all(reason.startswith("Odd.forward: forward ") for reason in reasons)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    grads = []
    for one in (model, fused[0]):
        (grad,) = torch.autograd.grad(one(x).float().sum() + x.sum(), x)
        grads.append(grad)
    assert torch.equal(*grads)


def test_what_is_left_and_why() -> None:
    model = nn.Sequential(
        Pair(nn.BatchNorm2d(4)), Pair(nn.BatchNorm2d(4)), Pair(nn.SyncBatchNorm(4))
    )
    nn.utils.parametrize.register_parametrization(model[0].norm, "weight", nn.Identity())
    model[1].norm.register_forward_hook(lambda *_: None)
    found = explain(fuse(model, training=True))
    assert dict(found.left_in_training) == {
        "0.norm": "it is parametrized",
        "1.norm": "it has hooks",
    }
    assert found.fused_in_training == ("2.conv",)
    assert "in training mode 1 of 3 batch norms fused" in found.summary()
    assert "in training mode" not in explain(fuse(model)).summary()


def test_compiled_models_train_on_their_layers() -> None:
    model = Pair(nn.BatchNorm2d(4))
    fused = fuse(model, training=True)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(train_step(compiled, x), train_step(model, x), atol=1e-6)


def test_weights_cannot_be_discarded_and_trained() -> None:
    with pytest.raises(ValueError, match="argument discard_weights: True with training=True"):
        fuse(network(), training=True, discard_weights=True)


def test_a_switch_is_followed_in_training_mode() -> None:
    """A fused training forward is guarded by what the original read, too."""
    from hostile import Block, images, require_same

    torch.manual_seed(0)
    plain = Block().train()
    model = fuse(plain, training=True)
    for switch, value in (("residual", False), ("scale", 2.0), ("mode", "other")):
        for one in (plain, model):
            setattr(one, switch, value)
        require_same(model(images()), plain(images()))
