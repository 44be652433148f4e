"""What fuse takes and what it leaves: forwards of every shape, hooks, shared and odd layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from fuse_models import conv_bn, images, network, require_same
from graphs import error
from resfuse.kernels import explain, fuse
from scope import Scope

# Forwards where fusing too much would change the result


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: (y := m.bn(m.conv(x))) + F.relu(y), id="bn read twice"),
        pytest.param(lambda m, x: (y := m.conv(x)) + m.bn(y), id="conv read twice"),
        pytest.param(lambda m, x: m.bn(m.conv(x)).add_(x).relu_(), id="methods in place"),
        pytest.param(lambda m, x: F.relu(m.bn(m.conv(x))) + x, id="add after activation"),
        pytest.param(lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2), id="alpha"),
        pytest.param(lambda m, x: m.bn(m.conv(x)) + 1, id="add a number"),
        pytest.param(lambda m, x: (y := m.bn(m.conv(x))) + y, id="add itself"),
        pytest.param(lambda m, x: m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True), id="broadcast"),
        pytest.param(lambda m, x: _residual_written(m, x), id="residual written in place"),
        pytest.param(lambda m, x: _input_written(m, x), id="input written in between"),
        pytest.param(lambda m, x: m.bn(m.conv(x)).view(x.shape[0], -1), id="view"),
        pytest.param(lambda m, x: m.bn(F.relu(x)) + m.conv(x), id="bn before"),
        pytest.param(lambda m, x: F.dropout(m.bn(m.conv(x)), training=m.training), id="dropout"),
        pytest.param(lambda m, x: F.leaky_relu(m.bn(m.conv(x)), 0.3), id="activation with a slope"),
    ],
)  # fmt: skip
def test_forwards_compute_the_same(forward) -> None:
    model = Scope(forward, **conv_bn()).eval()
    fused_model = fuse(model)
    assert explain(fused_model).lines[0].fused
    x = images(shape=(2, 8, 6, 7))
    written_by_one, written_by_other = x.clone(), x.clone()
    with torch.no_grad():
        want, got = model(written_by_one), fused_model(written_by_other)
    assert error(got, want) < 1e-6
    assert error(written_by_other, written_by_one) < 1e-6  # the caller's input, if it is written


def _residual_written(m: nn.Module, x: Tensor) -> Tensor:
    x += m.bn(m.conv(x))
    return x


def _input_written(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    x.mul_(3)
    return F.relu(m.bn(y)) + x


def test_a_forward_that_branches_on_values_is_left_and_named() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)) if x.sum() > 0 else m.conv(x)

    model = Scope(forward, **conv_bn()).eval()
    line = explain(fuse(model)).lines[0]
    assert not line.fused and "Scope.forward" in line.how
    for sign in (1.0, -1.0):
        x = sign * images(shape=(1, 8, 6, 6)).abs()
        with torch.no_grad():
            assert torch.equal(fuse(model)(x), model(x))


def test_a_forward_that_keeps_something_is_left() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        m.kept = m.bn(m.conv(x))
        return m.kept

    model = Scope(forward, **conv_bn()).eval()
    fused_model = fuse(model)
    assert "sets self.kept" in explain(fused_model).lines[0].how
    x = images(shape=(1, 8, 6, 6))
    with torch.no_grad():
        assert torch.equal(fused_model(x), fused_model.kept)


def test_frozen_batch_norm_is_folded_with_its_own_eps() -> None:
    frozen = FrozenBatchNorm2d(8, eps=0.3)
    nn.init.uniform_(frozen.running_var, 0.01, 0.1)
    model = Scope(lambda m, x: F.relu(m.bn(m.conv(x))), **(conv_bn() | {"bn": frozen})).eval()
    assert explain(fuse(model)).lines[0].how == "conv + bn + relu"
    require_same(fuse(model), model, images(shape=(1, 8, 6, 6)))


# Hooks, sharing, tying, parametrizations


def test_hooks_on_inner_layers_leave_them_alone_and_fire() -> None:
    model = network()
    seen = []
    model.layer1[0].bn1.register_forward_hook(lambda *_: seen.append("bn"))
    model.layer2[0].conv1.register_forward_pre_hook(lambda *_: seen.append("conv"))
    fused_model = fuse(model)
    require_same(fused_model, model, images())
    seen.clear()
    with torch.no_grad():
        fused_model(images())
    assert seen == ["bn", "conv"]
    left = {line.name: line.how for line in explain(fused_model, images()).left()}
    assert left == {"layer2.0.conv1": "it has hooks"}


@pytest.mark.parametrize(
    "name", ["layer1.0.conv1", "layer1.0", "layer2.0.downsample", "layer3", ""]
)
def test_hooks_that_come_later_fire(name: str) -> None:
    model = fuse(network())
    seen = []
    model.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    require_same(model, network(), images())
    seen.clear()
    with torch.no_grad():
        model(images())
    assert seen == [name]


def test_a_layer_replaced_later_is_used() -> None:
    model, fused_model = network(), fuse(network())
    torch.manual_seed(9)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    for one in (model, fused_model):
        one.layer1[0].conv1 = conv
    require_same(fused_model, model, images())


def test_what_is_left_alone_and_why() -> None:
    tied = nn.Conv2d(8, 8, 1)
    tied_too = nn.Conv2d(8, 8, 1)
    tied_too.weight = tied.weight
    cases = {
        "parametrized": parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        "reflect": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        "one side": nn.Conv2d(8, 8, 2, padding="same"),
        "tied": tied,
        "of its own": type("Own", (nn.Conv2d,), {"forward": lambda self, x: x})(8, 8, 1),
    }
    for expected, conv in cases.items():
        layers = conv_bn() | {"odd": conv, "tied": tied_too}
        model = Scope(lambda m, x: m.tied(m.odd(m.bn(m.conv(x)))), **layers).eval()
        how = {line.name: line.how for line in explain(fuse(model)).left()}
        assert expected in how["odd"], how
        require_same(fuse(model), model, images(shape=(1, 8, 6, 6)))


def test_batch_norm_without_statistics_is_not_folded() -> None:
    layers = conv_bn() | {"bn": nn.BatchNorm2d(8, track_running_stats=False)}
    model = Scope(lambda m, x: F.relu(m.bn(m.conv(x))), **layers).eval()
    x = images(shape=(2, 8, 6, 6))
    with torch.no_grad():
        assert torch.equal(fuse(model)(x), model(x))
    assert not explain(model).lines[0].fused


def test_a_layer_called_twice_is_left() -> None:
    model = Scope(lambda m, x: m.bn(m.conv(m.conv(x))), **conv_bn()).eval()
    assert "more than once" in explain(fuse(model)).lines[0].how
    require_same(fuse(model), model, images(shape=(1, 8, 6, 6)))
