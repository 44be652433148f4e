"""`fuse(model, precision="bf16")`, float32 in and out, and `fuse` of a model in bfloat16."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bf16_graphs import require_rounded_once
from graphs import error
from resfuse.kernels import explain, fuse, unfuse
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu import onednn
from resfuse.kernels.cpu.conv_program import ConvProgram
from resfuse.kernels.cpu.library import NativeUnavailable
from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.fusion.layers.fold_cache import pack
from resfuse.kernels.fusion.layers.fused_layers import ConvStep
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.ops.bn_folding import fold_conv_bn
from resfuse.kernels.ops.conv_problem import Geometry
from resfuse.kernels.ops.tolerance import EAGER_FACTOR

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16


def set_tiles(monkeypatch: pytest.MonkeyPatch, has_amx: bool) -> None:
    for module in ("cpu.onednn", "fusion.explain"):
        monkeypatch.setattr(
            f"resfuse.kernels.{module}.multiplies_tiles", lambda dtype: has_amx and dtype == BF16
        )


@pytest.fixture(autouse=True)
def _no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, False)


class Odd(nn.Module):
    """Odd numbers of channels, groups, what no native step computes, and sums of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 37, 3, stride=2, padding=1), nn.PReLU(37)
        self.second, self.norm = nn.Conv2d(37, 48, (1, 3), padding=(0, 1)), nn.BatchNorm2d(48)
        self.grouped = nn.Conv2d(48, 96, 3, padding=2, dilation=2, groups=48)
        self.few, self.few_norm = nn.Conv2d(96, 5, 1), nn.BatchNorm2d(5)
        self.back, self.last_norm = nn.Conv2d(5, 37, 1), nn.BatchNorm2d(37)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.first(x))
        z = F.relu(self.grouped(F.relu(self.norm(self.second(y)))))
        z = F.relu(self.few_norm(self.few(z)))
        return F.relu(self.last_norm(self.back(z)) + y)


def mobilenet() -> nn.Module:
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 2, 1]]
    return torchvision.models.MobileNetV2(num_classes=10, inverted_residual_setting=settings)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: torchvision.models.resnet18(num_classes=10),
    "bottlenecks": lambda: torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=10
    ),
    "MobileNetV2's blocks": mobilenet,
    "odd channels": Odd,
}


def made(name: str, images: int = 2) -> tuple[nn.Module, Tensor]:
    """With statistics of batch norms that fit the network, so that values stay of unit size."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(8, 3, 48, 48))
    return model.eval(), torch.randn(images, 3, 48, 48)


def small(stride: int = 1) -> nn.Sequential:
    torch.manual_seed(1)
    first = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    last = nn.Conv2d(16, 21, 3, stride, padding=1), nn.BatchNorm2d(21), nn.ReLU6()
    return nn.Sequential(*first, *last).eval()


X = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(2))


def layers(model: nn.Module) -> dict[str, ConvStep]:
    """The fused convolutions of a model by name."""
    plans = {name: plan_of(module) for name, module in model.named_modules()}
    return {
        f"{name}.{layer.name}".removeprefix("."): layer
        for name, plan in plans.items()
        if plan is not None
        for layer in plan.layers
    }


def storages(model: nn.Module) -> dict[str, str]:
    """What the fused convolutions of a model that has run compute in."""
    packed = {name: layer.fold.made.packed for name, layer in layers(model).items()}  # type: ignore[union-attr]
    return {
        name: conv.storage if isinstance(conv, NativeConv) else "torch's"
        for name, conv in packed.items()
    }


@torch.no_grad()
def require_as_right_as_eager(got: Tensor, model: nn.Module, x: Tensor) -> None:
    """At most EAGER_FACTOR times the error of the model in bfloat16."""
    want = copy.deepcopy(model).double()(x.double())
    found = error(got, want)
    allowed = EAGER_FACTOR * error(copy.deepcopy(model).to(BF16)(x.to(BF16)), want)
    assert got.shape == want.shape and 1e-5 < found < allowed, f"{found:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_as_right_as_eager_in_bfloat16(name: str, images: int) -> None:
    """With the layers' checks, without them, and joined: the same bits. In the other memory format
    torch adds up the last map in another order. (A map of one pixel would be eager's, in float32,
    there: its strides cannot be told otherwise.)
    """
    model, x = made(name, images)
    fused = fuse(model, x, precision="bf16")
    with torch.inference_mode():
        answers = [fused(x) for _ in range(4)]
        nhwc = fused(x.to(memory_format=torch.channels_last))
    require_as_right_as_eager(answers[0], model, x)
    assert all(y.dtype == torch.float32 and torch.equal(y, answers[0]) for y in answers)
    torch.testing.assert_close(nhwc, answers[0], rtol=1e-4, atol=1e-5)
    native = {layer for layer, storage in storages(fused).items() if storage == "bf16"}
    left = {"grouped", "few"} if name == "odd channels" else set()
    assert native == set(layers(fused)) - left


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_in_bfloat16_runs_the_same_kernels(name: str) -> None:
    model, x = made(name)
    narrow, given = copy.deepcopy(model).to(BF16), x.to(BF16)
    fused, asked = fuse(narrow, given), fuse(narrow, precision="bf16")
    with torch.inference_mode():
        answers = [fused(given) for _ in range(4)]
        assert torch.equal(asked(given), answers[0])
    assert all(y.dtype == BF16 and torch.equal(y, answers[0]) for y in answers)
    require_as_right_as_eager(answers[0], model, x)
    left = {"grouped", "few"} if name == "odd channels" else set()
    assert {n for n, storage in storages(fused).items() if storage == "bf16"} == (
        set(layers(fused)) - left
    )


def test_with_amx_a_model_in_bfloat16_is_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native steps have no tiles yet. A float32 model's layers are theirs all the same."""
    set_tiles(monkeypatch, True)
    monkeypatch.setattr(onednn, "PackedConv", lambda *given: given)
    layer = torch.randn(32, 16, 3, 3), torch.randn(32), Geometry(), "relu", None, (1, 16, 9, 9)
    narrow = (layer[0].to(BF16), *layer[1:])
    assert pack(*narrow) == narrow  # type: ignore[arg-type, comparison-overlap]
    assert isinstance(pack(*layer, None, "bf16"), NativeConv)  # type: ignore[arg-type]
    told = {line.name: line.precision for line in explain(small().to(BF16)).lines}
    assert set(told.values()) == {"bf16 by torch: it multiplies tiles (AMX)"}


@pytest.mark.parametrize("given", [torch.float32, BF16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(19, 35, 3, 1), (32, 32, 3, 1), (32, 32, 3, 32), (16, 40, 1, 1)])
def test_a_layer_rounds_what_it_reads_and_once_what_it_makes(
    shape: tuple[int, int, int, int], residual: bool, given: torch.dtype
) -> None:
    """Direct, in stride 2, where no Winograd form is; depthwise, whose weights are not rounded."""
    c, k, size, groups = shape
    if residual and c != k:
        pytest.skip("a sum of different shapes")
    torch.manual_seed(3)
    padding, stride = size // 2, 1 if residual else 2
    conv = nn.Conv2d(c, k, size, stride, padding, groups=groups, bias=False)
    norm = nn.BatchNorm2d(k)
    for value in (norm.weight, norm.running_mean, norm.bias):
        nn.init.normal_(value, 1, 0.3)  # type: ignore[arg-type]
    if residual:  # an even 3x3 of whole vectors would be computed by Winograd
        conv.dilation = conv.padding = (2, 2) if size == 3 else (0, 0)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return F.relu(y + x if residual else y)

    model = Layer().eval().to(given)
    x = torch.randn(2, c, 9, 10).to(given)
    fused = fuse(model, precision="bf16")
    with torch.inference_mode():
        got = [fused(x) for _ in range(3)]
    weight, bias = fold_conv_bn(model.conv, model.norm)
    weight, bias = weight.to(given), bias.to(given)
    if groups == 1:
        weight = weight.to(BF16)
    exact = x.to(BF16).double()
    want = F.conv2d(
        exact, weight.double(), bias.double(), conv.stride, conv.padding, conv.dilation, groups
    )
    want = F.relu(want + exact if residual else want)
    for y in got:
        assert y.dtype == given and torch.equal(y.to(BF16).to(given), y)
        require_rounded_once(y.to(BF16), want, 2e-5)


def test_a_region_is_converted_once_on_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for a MobileNetV2's convolutions: the images in, the last map out."""
    model, x = made("MobileNetV2's blocks")
    fused = fuse(model, precision="bf16")
    run, seen = ConvProgram.__call__, []

    def counted(self: ConvProgram, *inputs: Tensor) -> list[Tensor]:
        seen.append([call.conv.makes for call in self._calls])
        return run(self, *inputs)

    with torch.inference_mode():
        want = [fused(x) for _ in range(3)][-1]
        monkeypatch.setattr(ConvProgram, "__call__", counted)
        assert torch.equal(fused(x), want)
    (makes,) = seen
    assert makes[0] == "bf16" and makes[-1] == "fp32" and len(makes) == len(layers(fused)) + 2
    assert makes.count("fp32") == 1


def test_what_is_kept_is_computed_in_float32() -> None:
    model, x = made("ResNet-18")
    some = fuse(model, x, precision="bf16", keep=["layer1", "layer4.*.conv2", "fc"])
    every = fuse(model, precision="bf16", keep=["*"])
    plain = fuse(model)
    with torch.inference_mode():
        answers = [some(x) for _ in range(4)]
        assert all(torch.equal(y, answers[0]) for y in answers)
        for _ in range(3):
            assert torch.equal(every(x), plain(x))
    found = storages(some)
    kept = {n for n in found if n.startswith("layer1") or re.fullmatch(r"layer4\..\.conv2", n)}
    assert {n for n, storage in found.items() if storage == "fp32"} == kept and len(kept) == 6
    require_as_right_as_eager(answers[0], model, x)
    lines = {line.name: line.precision for line in explain(some, x).lines}
    assert lines["layer1.0.conv1"] == "fp32: kept" and lines["layer2.0.conv1"] == "bf16"


def test_explain_says_what_is_computed_in_which_precision_and_why() -> None:
    model, _ = made("odd channels")
    model.alone = nn.Conv2d(3, 3, 1)
    told = explain(fuse(model, precision="bf16"))
    lines = {line.name: line.precision for line in told.lines}
    assert lines == {
        "first": "bf16", "second": "bf16",
        "grouped": "fp32: groups that fill no more than half a vector",
        "few": "fp32: only 5 output channels", "back": "bf16", "alone": "fp32: not fused",
    }  # fmt: skip
    assert "precision" in str(told) and "; 3 in bf16" in told.summary()
    assert "precision" not in str(explain(fuse(model)))
    narrow = {line.name: line.precision for line in explain(model.to(BF16)).lines}
    assert narrow["first"] == "bf16"
    assert narrow["few"] == "bf16 by torch: only 5 output channels"


def test_unfused_trained_and_differentiated_it_is_the_model_itself() -> None:
    model, x = made("ResNet-18")
    fused = fuse(model, precision="bf16")
    with torch.no_grad():
        want = model(x)
        assert not torch.equal(fused(x), want)
    with pytest.warns(UserWarning, match="gradients are enabled"):
        assert torch.equal(fused(x), want)
    given = x.clone().requires_grad_()
    fused(given).sum().backward()
    other = x.clone().requires_grad_()
    model(other).sum().backward()
    assert torch.equal(given.grad, other.grad)  # type: ignore[arg-type]
    assert torch.equal(fused.train()(x), copy.deepcopy(model).train()(x))
    back = unfuse(copy.deepcopy(fuse(model, precision="bf16")))
    with torch.no_grad():
        assert torch.equal(back(x), want)


def test_weights_are_followed() -> None:
    model, x = made("MobileNetV2's blocks")
    fused = fuse(model, precision="bf16")
    with torch.inference_mode():
        before = [fused(x) for _ in range(3)][-1]
    with torch.no_grad():
        for changed in (fused, model):
            changed.features[1].conv[0][0].weight.mul_(1.5)  # type: ignore[index, union-attr]
            changed.features[2].conv[1][1].bias.data.add_(0.25)  # type: ignore[index, union-attr]
    with torch.inference_mode():
        after = [fused(x) for _ in range(3)]
        anew = fuse(model, precision="bf16")(x)
    assert not torch.equal(before, after[0]) and all(torch.equal(y, anew) for y in after)
    require_as_right_as_eager(after[0], model, x)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_in_their_precision(again: Callable[[nn.Module], nn.Module]) -> None:
    model, x = made("ResNet-18")
    fused = fuse(model, precision="bf16", keep=["layer2"])
    twin = again(fused)
    with torch.inference_mode():
        assert torch.equal(twin(x), fused(x))
        for _ in range(2):
            twin(x)
    assert storages(twin)["layer1.0.conv1"] == "bf16" and storages(twin)["layer2.0.conv1"] == "fp32"


def test_fused_again_in_another_precision() -> None:
    model = small()
    plain, narrow = fuse(model), fuse(model, precision="bf16")
    with torch.inference_mode():
        for _ in range(3):
            plain(X), narrow(X)
        fuse(plain, inplace=True, precision="bf16")
        assert torch.equal(plain(X), narrow(X))
        fuse(plain, inplace=True)
        assert torch.equal(plain(X), fuse(model)(X))
        freed = fuse(model, precision="bf16", discard_weights=True)
        assert all(torch.equal(freed(X), narrow(X)) for _ in range(3))
        with pytest.raises(ValueError, match="without weights"):
            fuse(freed, inplace=True)


def test_exported_it_computes_in_float32() -> None:
    model = small()
    fused = fuse(model, precision="bf16")
    with torch.no_grad():
        fused(X)
        program = torch.export.export(fused, (X,)).module()
        torch.testing.assert_close(program(X), model(X))


@pytest.mark.parametrize("given", [torch.float32, BF16])
def test_nan_and_infinity_come_out_as_torch_has_them(given: torch.dtype) -> None:
    """In direct forms: Winograd's spread NaN over a tile, as they do in float32."""
    model, x = small(stride=2).to(given), X.to(given, copy=True)
    x[0, 0, 1, 1], x[0, 1, 6, 6], x[1, 2, 5, 2] = float("nan"), float("inf"), -float("inf")
    fused = fuse(model, precision="bf16")
    with torch.inference_mode():
        want = model.double()(x.double())
        for _ in range(3):
            y = fused(x)
            assert torch.equal(y.isnan(), want.isnan()) and want.isnan().any()


def test_under_autocast_and_behind_it() -> None:
    model, x = made("ResNet-18")
    fused = fuse(model, precision="bf16")
    with torch.inference_mode():
        want = fused(x)
        with torch.autocast("cpu", BF16):
            got = fused(x)
        require_as_right_as_eager(got, model, x)
        assert all(torch.equal(fused(x), want) for _ in range(3))


def test_without_native_steps_it_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    fused = fuse(model, precision="bf16")

    def unavailable(*given: object) -> None:
        raise NativeUnavailable("no compiler")

    monkeypatch.setattr(native_library, "library_for", unavailable)
    with torch.inference_mode():
        torch.testing.assert_close(fused(X), model(X))
    assert {line.precision for line in explain(fused).lines} == {"fp32: no compiler"}


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "an unknown precision": (
        lambda: fuse(small(), precision="int8"),
        "argument precision: 'int8'; accepted: fp32, bf16",
    ),
    "float32 of a model in bfloat16": (
        lambda: fuse(small().to(BF16), precision="fp32"),
        "argument precision: 'fp32' of a model that takes torch.bfloat16",
    ),
    "a model in float16": (
        lambda: fuse(small().half(), precision="bf16"),
        "argument precision: 'bf16' of a model that takes torch.float16",
    ),
    "a model in float64": (
        lambda: fuse(small().double(), precision="bf16"),
        "argument precision: 'bf16' of a model that takes torch.float64",
    ),
    "norms in float64": (
        lambda: fuse(small_with_wide_norm(), precision="bf16"),
        "argument model: 1.weight is torch.float64; precision='bf16' accepts weights in float32",
    ),
    "a pattern that matches nothing": (
        lambda: fuse(small(), precision="bf16", keep=["0", "head.*"]),
        "argument keep: 'head.*' matches no convolution or linear layer; accepted: names of modules"
        " or parameters such as 0, 3",
    ),
    "patterns without bf16": (
        lambda: fuse(small(), keep=["0"]),
        "argument keep: given without precision='bf16'",
    ),
    "one pattern, in no list": (
        lambda: fuse(small(), precision="bf16", keep="0"),
        "argument keep: '0'; accepted: a list of patterns",
    ),
    "patterns for a model in bfloat16": (
        lambda: fuse(small().to(BF16), precision="bf16", keep=["0"]),
        "argument keep: the model is in bfloat16 itself",
    ),
}


def small_with_wide_norm() -> nn.Module:
    model = small()
    model[1].double()
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_in_a_sentence(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        call()
    assert "\n" not in str(raised.value)
