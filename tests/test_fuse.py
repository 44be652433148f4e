"""fuse, unfuse, fused, explain: what they promise to somebody else's model."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, vit_b_16
from torchvision.ops import FrozenBatchNorm2d

from resfuse.kernels import FusedBottleneck, explain, fuse, fused, unfuse
from resfuse.kernels.native import packed as native
from resfuse.kernels.native.library import why_unavailable
from resfuse.kernels.native.packed import NativeConv
from resfuse.kernels.onednn import PackedConv
from resfuse.kernels.plan import plan_of
from resfuse.kernels.tolerance import EAGER_FACTOR, TOLERANCES

IMAGES = (2, 3, 33, 40)  # not 32: see test_fuse_zoo.SIZES


def network(seed: int = 0) -> nn.Module:
    """A ResNet-18 whose batch norms are not the identity."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def images(seed: int = 1, shape: tuple[int, ...] = IMAGES) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def require_same(fused_model: nn.Module, plain: nn.Module, x: Tensor, mode: str = "ieee") -> None:
    """The rule of the whole project: at most twice eager's own error against fp64."""
    reference = copy.deepcopy(plain).double()(x.double())
    allowed = EAGER_FACTOR * error(plain(x), reference) + TOLERANCES[mode].rtol
    assert error(fused_model(x), reference) <= allowed


def is_fused(model: nn.Module) -> bool:
    return any(plan_of(module) is not None for module in model.modules())


class Scope(nn.Module):
    """A module around one function of its layers, for forwards of every shape."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv_bn(channels: int = 8) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(channels)
    nn.init.normal_(bn.running_mean)
    return {"conv": nn.Conv2d(channels, channels, 3, padding=1), "bn": bn}


# What stays as it was


def test_names_classes_and_parameters_stay() -> None:
    model = network()
    fused_model = fuse(model)
    assert list(fused_model.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused_model.named_modules()] == [n for n, _ in model.named_modules()]
    assert isinstance(fused_model.layer1[0], type(model.layer1[0]))
    assert fused_model is not model and not is_fused(model)
    assert fuse(model, inplace=True) is model and is_fused(model)


def test_state_dicts_load_strictly_both_ways() -> None:
    model, other = network(), network(seed=5)
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(images())
    fused_model.load_state_dict(other.state_dict(), strict=True)
    require_same(fused_model, other, images())
    model.load_state_dict(fused_model.state_dict(), strict=True)
    assert torch.equal(model(images()), other(images()))


def test_unfuse_gives_back_the_same_bits() -> None:
    model = network()
    before = model(images())
    fused_model = fuse(model, inplace=True)
    with torch.no_grad():
        fused_model(images())
    assert torch.equal(unfuse(fused_model)(images()), before)
    assert type(model) is type(network())


def test_fused_is_fused_inside_only() -> None:
    model = network()
    with fused(model) as same:
        assert same is model and is_fused(model)
    assert not is_fused(model)
    with pytest.raises(RuntimeError, match="stop"), fused(model):
        raise RuntimeError("stop")
    assert not is_fused(model)


def test_fusing_twice_is_fusing_once() -> None:
    once = fuse(network())
    twice = fuse(once)
    assert type(twice) is type(once)
    require_same(twice, network(), images())


# Training


def test_training_mode_is_the_original() -> None:
    model = network()
    fused_model = fuse(model)
    outputs = []
    for one in (model.train(), fused_model.train()):
        y = one(images())
        y.square().mean().backward()
        outputs.append(y)
    assert torch.equal(*outputs)
    for (name, a), b in zip(
        model.state_dict().items(), fused_model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for a, b in zip(model.parameters(), fused_model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_folded_weights_follow_an_optimizer() -> None:
    model = network()
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(images())
    for one in (model, fused_model):
        optimizer = torch.optim.SGD(one.train().parameters(), lr=0.1, momentum=0.9)
        for seed in range(2):
            optimizer.zero_grad()
            one(images(seed)).square().mean().backward()
            optimizer.step()
        one.eval()
    require_same(fused_model, model, images())


@pytest.mark.parametrize(
    "which", ["conv1.weight", "bn1.weight", "bn1.running_var", "layer1.0.bn2.bias"]
)
def test_folded_weights_follow_a_write_in_place(which: str) -> None:
    model = network()
    fused_model = fuse(model)
    with torch.no_grad():
        before = fused_model(images())
        for one in (model, fused_model):
            one.state_dict()[which].mul_(1.5)
        assert error(fused_model(images()), before) > 1e-3
    require_same(fused_model, model, images())


def test_eval_mode_gradients_are_the_originals_and_say_so() -> None:
    model = network()
    fused_model = fuse(model)
    with pytest.warns(UserWarning, match="gradients are enabled"):
        fused_model(images()).square().mean().backward()
    model(images()).square().mean().backward()
    for a, b in zip(model.parameters(), fused_model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_frozen_parameters_still_give_the_input_its_gradient() -> None:
    model = network().requires_grad_(False)
    fused_model = fuse(model)
    grads = []
    for one in (model, fused_model):
        x = images().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one(x).square().mean().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_an_inner_batch_norm_in_training_mode_is_respected() -> None:
    model = network()
    fused_model = fuse(model)
    for one in (model, fused_model):
        one.layer2[0].bn1.train()
    with torch.no_grad():
        assert error(fused_model(images()), model(images())) < 1e-5
    moved = fused_model.layer2[0].bn1.running_mean
    assert torch.allclose(moved, model.layer2[0].bn1.running_mean, atol=1e-5)
    assert not torch.equal(moved, network().layer2[0].bn1.running_mean)


# Moving and copying


@pytest.mark.parametrize("dtype, mode", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_follows_a_change_of_dtype(dtype: torch.dtype, mode: str) -> None:
    model = network()
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(images())
    require_same(fused_model.to(dtype), model.to(dtype), images().to(dtype), mode)


def test_computes_in_fp64() -> None:
    model = network().double()
    with torch.no_grad():
        assert error(fuse(model)(images().double()), model(images().double())) < 1e-14


def test_follows_a_change_of_memory_format() -> None:
    model = network()
    fused_model = fuse(model).to(memory_format=torch.channels_last)
    require_same(fused_model, model, images().to(memory_format=torch.channels_last))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(how: str) -> None:
    fused_model = fuse(network())
    with torch.no_grad():
        before = fused_model(images())
        if how == "deepcopy":
            other = copy.deepcopy(fused_model)
        else:
            file = io.BytesIO()
            torch.save(fused_model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert type(other) is type(fused_model) and is_fused(other)
        assert torch.equal(other(images()), before)
        other.conv1.weight.zero_()
        assert not torch.equal(other(images()), before)
        assert torch.equal(fused_model(images()), before)


def test_a_copy_leaves_alone_what_was_left() -> None:
    shared = nn.Conv2d(8, 8, 1)
    inner = Scope(lambda m, x: m.bn(m.conv(x)), conv=shared, bn=nn.BatchNorm2d(8))
    model = Scope(lambda m, x: m.inner(m.body(x)) + m.again(x), inner=inner, again=shared,
                  body=Scope(lambda m, x: m.bn(m.conv(x)), **conv_bn())).eval()  # fmt: skip
    for one in (fuse(model), copy.deepcopy(fuse(model))):
        how = {line.name: line.how for line in explain(one, images(shape=(1, 8, 5, 5))).lines}
        assert "shared" in how["inner.conv"] and how["body.conv"] == "conv + bn"


def test_inference_tensors_as_weights() -> None:
    with torch.inference_mode():
        model = network()
        fused_model = fuse(model)
        assert error(fused_model(images()), model(images())) < 1e-5


def test_functional_call_uses_the_weights_given() -> None:
    model, other = network(), network(seed=7)
    weights = dict(other.state_dict())
    with torch.no_grad():
        got = torch.func.functional_call(fuse(model), weights, (images(),))
        assert error(got, other(images())) < 1e-5


def test_discarded_weights_answer_and_refuse_the_rest() -> None:
    model = network()
    fused_model = fuse(model, discard_weights=True)
    require_same(fused_model, model, images())
    require_same(fused_model, model, images(shape=(1, 3, 50, 40)))
    held = sum(p.numel() for p in fused_model.parameters() if p.device.type != "meta")
    assert held < sum(p.numel() for p in model.parameters()) / 100
    refused = [
        lambda: unfuse(fused_model),
        lambda: copy.deepcopy(fused_model),
        lambda: fused_model.train()(images()),
        lambda: fused_model.eval()(images().double()),
    ]
    for act in refused:
        with pytest.raises(RuntimeError, match="discard_weights=True"), torch.no_grad():
            act()
    require_same(fused_model, model, images())


# Tools that look inside


def test_flop_counter_sees_every_convolution() -> None:
    model = network()
    counts = []
    for one in (model, fuse(model)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_vmap_and_jit_trace_run_the_layers() -> None:
    model = network().requires_grad_(False)
    fused_model = fuse(model)
    stacked = torch.stack([images(0), images(1)])
    assert error(torch.vmap(fused_model)(stacked), torch.vmap(model)(stacked)) < 1e-5
    traced = torch.jit.trace(fused_model, images())
    assert error(traced(images(3)), model(images(3))) < 1e-5


def test_autocast_computes_in_its_dtype() -> None:
    model = network()
    fused_model = fuse(model)
    reference = copy.deepcopy(model).double()(images().double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, got = model(images()), fused_model(images())
    assert got.dtype == plain.dtype == torch.bfloat16
    assert error(got, reference) <= EAGER_FACTOR * error(plain, reference) + 8e-3


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


# In a sequence of blocks, each may add its residual to its own input


class Keeper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return x


def blocks(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    stages = [FusedBottleneck(16, 4), *between, FusedBottleneck(16, 4), FusedBottleneck(16, 4)]
    return nn.Sequential(*stages).eval()


@pytest.fixture(params=["native", "onednn"])
def conv_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """What computes convolutions on this CPU: native steps, or oneDNN where there are none."""
    if request.param == "onednn":
        monkeypatch.setattr(native, "supports", lambda *layer: False)
        return PackedConv
    if (reason := why_unavailable()) is not None:
        pytest.skip(reason)
    return NativeConv


def test_residuals_are_added_in_place_where_nobody_looks(conv_class: type) -> None:
    model = fuse(blocks())
    x = images(shape=(2, 16, 6, 5)).to(memory_format=torch.channels_last)
    before = x.clone()
    seen = []
    with torch.no_grad():
        want = unfuse(copy.deepcopy(model))(x)
        run = conv_class.add
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                conv_class,
                "add",
                lambda self, x, r, overwrite: seen.append(overwrite) or run(self, x, r, overwrite),
            )
            got = model(x)
    assert seen == [False, True, True]  # the first block's input is the caller's
    assert torch.equal(x, before)
    assert error(got, want) < 1e-6


def test_the_straight_run_is_the_checked_one(conv_class: type) -> None:
    """The second run of a shape leaves out the checks; another shape, layout or weight has them."""
    plain = unfuse(blocks())
    model = fuse(plain)
    inputs = [images(seed, (2, 16, 6, 5)) for seed in (1, 2)]
    inputs += [images(3, (2, 16, 6, 5)).to(memory_format=torch.channels_last)] * 2
    inputs += [images(4, (1, 16, 3, 8))] * 2 + [images(5, (0, 16, 6, 5))] + inputs[:1]
    with torch.no_grad():
        for x in inputs:
            assert torch.allclose(model(x), plain(x), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                assert model(inputs[0]).dtype == torch.bfloat16
        assert torch.allclose(model(inputs[0]), plain(inputs[0]), atol=1e-5)
        for one in (model, plain):
            one[1].conv2.weight.mul_(2)
        assert torch.allclose(model(inputs[0]), plain(inputs[0]), atol=1e-5)
        model.double(), plain.double()
        assert torch.allclose(model(inputs[0].double()), plain(inputs[0].double()))


def test_what_somebody_keeps_is_not_written_over() -> None:
    keeper = Keeper()
    model = fuse(blocks(keeper))
    keeper = model[1]
    with torch.no_grad():
        want = unfuse(copy.deepcopy(model))
        x = images(shape=(1, 16, 6, 5))
        y = want(x)
        kept = want[1].kept
        assert error(model(x), y) < 1e-6
    assert error(keeper.kept, kept) < 1e-6


def test_outputs_a_hook_keeps_are_not_written_over() -> None:
    model = fuse(blocks())
    kept = []
    model[0].register_forward_hook(lambda m, args, y: kept.append(y))
    with torch.no_grad():
        x = images(shape=(1, 16, 6, 5))
        model(x)
        assert torch.equal(kept[0], model[0](x))


def test_blocks_called_by_hand_keep_their_input() -> None:
    model = fuse(blocks())
    x = images(shape=(1, 16, 6, 5)).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        y = model[0](x)
        held = y.clone()
        model[1](y)
    assert torch.equal(x, before) and torch.equal(y, held)


def test_frozen_batch_norm_is_folded_with_its_own_eps() -> None:
    frozen = FrozenBatchNorm2d(8, eps=0.3)
    nn.init.uniform_(frozen.running_var, 0.01, 0.1)
    model = Scope(lambda m, x: F.relu(m.bn(m.conv(x))), **(conv_bn() | {"bn": frozen})).eval()
    assert explain(fuse(model)).lines[0].how == "conv + bn + relu"
    require_same(fuse(model), model, images(shape=(1, 8, 6, 6)))


# Inputs the fused layers do not take are the layers' own business


def test_an_empty_batch_and_an_unbatched_image() -> None:
    model = Scope(lambda m, x: m.relu(m.conv(x)), relu=nn.ReLU(), conv=nn.Conv2d(8, 8, 3)).eval()
    fused_model = fuse(model)
    with torch.no_grad():
        assert fused_model(torch.zeros(0, 8, 6, 6)).shape == (0, 8, 4, 4)
        x = images(shape=(8, 6, 6))
        assert torch.equal(fused_model(x), model(x))


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 20, 20), torch.zeros(1, 3, 20, 20).double(), None])
def test_wrong_inputs_get_the_original_error(x: Tensor | None) -> None:
    model = network()
    with torch.no_grad():
        with pytest.raises((RuntimeError, TypeError, AttributeError)) as original:
            model(x)
        with pytest.raises(original.type) as ours:
            fuse(model)(x)
    assert str(ours.value) == str(original.value)


@pytest.mark.parametrize("act", [nn.Identity, nn.SiLU, nn.LeakyReLU])
def test_nan_and_inf_pass_through(act: type[nn.Module]) -> None:
    """But for oneDNN's clipping activations: see onednn.py. The GPU kernels keep NaN in all."""
    model = Scope(lambda m, x: m.act(m.bn(m.conv(x)) + x), act=act(), **conv_bn()).eval()
    x = images(shape=(1, 8, 6, 6))
    x[0, 0, 0, 0], x[0, 1, 5, 5] = float("nan"), float("inf")
    with torch.no_grad():
        want, got = model(x), fuse(model)(x)
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()
    assert torch.equal(got.isinf(), want.isinf())


# explain


def test_explain_counts_macs_and_shares() -> None:
    said = explain(fuse(network()), images(shape=(2, 3, 224, 224)))
    assert sum(line.macs for line in said.lines) == 1_813_561_344  # torchvision's 1.814 less the fc
    assert said.share == 1.0 and not said.left()
    assert "20 of 20 convolutions fused, 100.0 % of their MACs" in str(said)
    assert said.lines[0].how == "conv + bn + relu + max_pool"


def test_explain_of_an_unfused_model_says_so() -> None:
    model = network()
    assert "is not fused" in str(explain(model))
    assert type(model) is type(network())


@pytest.mark.parametrize("model", [vit_b_16(), nn.TransformerEncoderLayer(16, 2)])
def test_transformers_are_left_unchanged(model: nn.Module) -> None:
    fused_model = fuse(model)
    assert [type(m) for m in fused_model.modules()] == [type(m) for m in model.modules()]
    said = explain(fused_model)
    assert not any(line.fused for line in said.lines)
    assert "0 of 1" in str(said) or "nothing to fuse" in str(said)


def test_explain_without_a_usable_example_still_lists() -> None:
    model = Scope(lambda m, x: m.bn(m.conv(x["a"]["b"])), **conv_bn()).eval()
    said = explain(fuse(model))
    assert said.share is None and "give explain an example" in str(said)


# Bad input: one sentence each


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: (lambda x: x), "argument model: a function; accepted: a torch.nn.Module"),
        (lambda: network().to("meta"), "argument model: on the meta device"),
        (lambda: _with(network(), "layer1", network().layer1.to("meta")), "meta"),
        (lambda: _with_weight(torch.complex64), "weight is torch.complex64; accepted: torch.float"),
        (lambda: _with_weight(torch.int8), "conv.weight is torch.int8; accepted"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_fused(make, message: str) -> None:
    with pytest.raises(ValueError, match="argument model") as refusal:
        fuse(make())
    assert message in str(refusal.value)


def _with(model: nn.Module, name: str, child: nn.Module) -> nn.Module:
    setattr(model, name, child)
    return model


def _with_weight(dtype: torch.dtype) -> nn.Module:
    model = Scope(lambda m, x: m.bn(m.conv(x)), **conv_bn())
    model.conv.weight = nn.Parameter(torch.zeros(8, 8, 3, 3, dtype=dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("shape", [(1, 4, 40, 40), (3,)])
def test_an_example_that_does_not_fit(shape: tuple[int, ...]) -> None:
    model = network()
    with pytest.raises(ValueError, match="argument example: shape"):
        fuse(model, torch.zeros(shape), inplace=True)
    assert not is_fused(model)
    with pytest.raises(ValueError, match="argument example"):
        explain(model, torch.zeros(shape))


def test_an_example_finds_a_wrong_kernel(conv_class: type) -> None:
    right = conv_class.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_class, "__call__", lambda self, x: right(self, x) * 1.001)
        with pytest.raises(ValueError, match="off by"):
            fuse(network(), images())
    assert is_fused(fuse(network(), images()))
