"""What fused layers and fuse itself are given, and what explain tells."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vit_b_16

from fuse_models import conv_bn, images, is_fused, network, require_same
from resfuse.kernels import explain, fuse
from scope import Scope

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("act", [nn.Identity, nn.SiLU, nn.LeakyReLU, nn.GELU])
def test_nan_and_inf_pass_through(act: type[nn.Module]) -> None:
    """But for oneDNN's clipping activations: see onednn.py. The GPU kernels keep NaN in all.
    torch's GELU of infinity is NaN in NCHW on some CPUs (a Zen 5), infinity in channels_last."""
    model = Scope(lambda m, x: m.act(m.bn(m.conv(x)) + x), act=act(), **conv_bn()).eval()
    x = images(shape=(1, 8, 6, 6))
    x[0, 0, 0, 0], x[0, 1, 5, 5] = float("nan"), float("inf")
    nhwc = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted, got = [model(x), model(nhwc)], fuse(model)(x)
    assert all(want.isnan().any() for want in wanted)
    assert any(
        torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        for want in wanted
    )


GELUS: dict[str, tuple[Scope, str]] = {
    "a layer": (Scope(lambda m, x: m.act(m.bn(m.conv(x))), act=nn.GELU(), **conv_bn()), "gelu"),
    "a layer, by tanh": (
        Scope(lambda m, x: m.act(m.bn(m.conv(x)) + x), act=nn.GELU("tanh"), **conv_bn()),
        "gelu_tanh",
    ),
    "a call": (Scope(lambda m, x: F.gelu(m.bn(m.conv(x))) + x, **conv_bn()), "gelu"),
    "a call, by tanh": (
        Scope(lambda m, x: F.gelu(m.bn(m.conv(x)), approximate="tanh"), **conv_bn()), "gelu_tanh",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GELUS)
def test_gelu_in_both_its_forms(name: str) -> None:
    """They are 4e-4 apart."""
    model, activation = GELUS[name]
    model.eval()
    fused_model, x = fuse(model), 3 * images(shape=(2, 8, 6, 6))
    assert [line.how.split(" + ")[-1 - (name == "a call")] for line in explain(model, x).lines] == [
        activation
    ]
    require_same(fused_model, model, x)
    if hasattr(model, "act"):
        for one in (model, fused_model):
            one.act.approximate = "tanh" if activation == "gelu" else "none"
        require_same(fused_model, model, x)


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


@pytest.mark.parametrize("make", [vit_b_16, lambda: nn.TransformerEncoderLayer(16, 2)])
def test_transformers_are_left_unchanged(make: Callable[[], nn.Module]) -> None:
    model = make()
    fused_model = fuse(model)
    assert [type(m) for m in fused_model.modules()] == [type(m) for m in model.modules()]
    said = explain(fused_model)
    assert not any(line.fused for line in said.lines)
    assert "0 of 1" in str(said) or "no 2-D convolution" in str(said)


def test_explain_without_a_usable_example_still_lists() -> None:
    model = Scope(lambda m, x: m.bn(m.conv(x["a"]["b"])), **conv_bn()).eval()
    said = explain(fuse(model))
    assert said.share is None and "give explain an example" in str(said)
