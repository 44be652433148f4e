"""Batch norm in training mode, with residual or projection and ReLU: against torch in fp64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import require_close
from kernel_inputs import DEVICE, DTYPES, NEEDS_GPU, image
from resfuse.kernels.gpu.batch_norm.batch_norm_config import (
    CONFIGS,
    DISTINCT,
    Config,
    NormProblem,
    candidates,
)
from resfuse.kernels.gpu.batch_norm.batch_norm_config import choose as choose_config
from resfuse.kernels.gpu.batch_norm.batch_statistics import (
    batch_statistics,
    batch_statistics_ref,
    bn_merge_op,
    bn_partials_op,
)
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import empty_partials, launch_partials
from resfuse.kernels.gpu.batch_norm.bn_add_relu import (
    Norm,
    bn_add_relu,
    bn_add_relu_backward_op,
    bn_add_relu_op,
    bn_add_relu_ref,
)
from resfuse.kernels.gpu.batch_norm.bn_add_relu_kernel import (
    Normed,
    launch_backward,
    launch_forward,
    shipped,
)
from resfuse.kernels.ops.conv_problem import math_mode_of

# n, c, h, w: a ResNet shape cut small, primes, single pixels, channels past a block
SHAPES = [(2, 64, 4, 6), (3, 13, 5, 7), (9, 8, 1, 1), (3, 67, 2, 1)]
ADDED = ("nothing", "residual", "shortcut")
# A gradient adds up a whole batch, twice: granted are the roundings of so long a sum.
LONG = 400


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Images away from zero mean and unit variance, and the vectors of two norms."""
    c = shape[1]
    images = {name: (2 * image(*shape) + 3).to(dtype) for name in ("x", "added")}
    vectors = ("weight", "bias", "weight2", "bias2")
    return images | {name: torch.randn(c, device=DEVICE) for name in vectors}


def run(
    op: Any, given: dict[str, Tensor], added: str, dtype: torch.dtype | None = None,
    *, affine: bool = True, training: bool = True, relu: bool = True,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Answer, all gradients and running statistics of an op, computed in `dtype`."""
    own = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in given.items()}
    norms = []
    for suffix in ("", "2"):
        running = [torch.full_like(own["bias"].detach(), value) for value in (0.5, 2.0)]
        parameters = [own[f"weight{suffix}"], own[f"bias{suffix}"]] if affine else [None, None]
        norms.append(Norm(*parameters, *running, training=training, momentum=0.3, eps=1e-3))
    options: dict[str, Any] = {"activation": "relu" if relu else "identity"}
    if added == "residual":
        options["residual"] = own["added"]
    if added == "shortcut":
        options["shortcut"] = (own["added"], norms[1])
    y = op(own["x"], norms[0], **options)
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, device=DEVICE).to(given["x"].dtype)
    y.backward(upstream.to(y.dtype))
    grads = {f"grad of {name}": leaf.grad for name, leaf in own.items()}
    means = {f"mean{i}": norm.running_mean for i, norm in enumerate(norms)}
    variances = {f"var{i}": norm.running_var for i, norm in enumerate(norms)}
    return {"y": y.detach(), **grads, **means, **variances}


def require_agreement(given: dict[str, Tensor], added: str, **options: bool) -> None:
    got = run(bn_add_relu, given, added, **options)
    want = run(bn_add_relu_ref, given, added, torch.float64, **options)
    for name, exact in want.items():
        found = got[name]
        assert (found is None) == (exact is None), name
        if found is not None and exact is not None:
            mode = math_mode_of(given["x"].dtype if found.dim() == 4 else torch.float32)
            require_close(found, exact, mode, LONG)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_fp64(shape: tuple[int, ...], added: str) -> None:
    require_agreement(operands(shape, torch.float32), added)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("added", ADDED)
def test_keeps_statistics_in_fp32(added: str, dtype: torch.dtype) -> None:
    """Of 16-bit images, the vectors' gradients and running statistics are right to fp32."""
    require_agreement(operands((3, 13, 5, 7), dtype), added)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize(
    "option", [{"affine": False}, {"training": False}, {"relu": False}], ids=str
)
def test_agrees_in_every_form(option: dict[str, bool], added: str) -> None:
    require_agreement(operands((2, 7, 3, 5), torch.float32), added, **option)


def test_takes_any_memory_layout() -> None:
    given = operands((2, 6, 4, 10), torch.float32)
    given["x"] = given["x"].contiguous()[:, :, 1:, ::2]
    given["added"] = given["added"].contiguous()[:, :, :3, 5:]
    require_agreement(given, "shortcut")


@settings(max_examples=8)
@given(
    n=st.integers(1, 3), c=st.integers(1, 70), h=st.integers(2, 9), w=st.integers(1, 9),
    added=st.sampled_from(ADDED),
)  # fmt: skip
def test_agrees_on_any_shape(n: int, c: int, h: int, w: int, added: str) -> None:
    torch.manual_seed(n * c * h * w)
    given = operands((n, c, h, w), torch.float32)
    got = run(bn_add_relu, given, added)["y"]
    want = run(bn_add_relu_ref, given, added, torch.float64)["y"]
    assert got is not None and want is not None
    # two pixels of nearly one value: what is left of their difference is rounded, times rstd < 32
    require_close(got, want, "ieee", 100 * LONG)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_formula_against_finite_differences(added: str, training: bool) -> None:
    given = operands((2, 3, 2, 3), torch.float32)
    leaves = [given[name].double().requires_grad_() for name in given]
    running = [torch.ones(3, dtype=torch.float64, device=DEVICE) for _ in range(2)]

    def join(x: Tensor, other: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        norm, norm2 = (Norm(*wb, *running, training, 0.0) for wb in ((w, b), (w2, b2)))
        residual = other if added == "residual" else None
        shortcut = (other, norm2) if added == "shortcut" else None
        return bn_add_relu(x, norm, residual, shortcut=shortcut)

    used = {"nothing": [0, 2, 3], "residual": [0, 1, 2, 3], "shortcut": [0, 1, 2, 3, 4, 5]}[added]
    free = [leaves[i] for i in used]

    def function(*some: Tensor) -> Tensor:
        every = [leaf.detach() for leaf in leaves]
        for i, leaf in zip(used, some, strict=True):
            every[i] = leaf
        return join(*every)

    assert torch.autograd.gradcheck(function, free)


@pytest.mark.parametrize("config", [*CONFIGS, Config(16, 16, 3, 1)], ids=Config.label)
def test_every_configuration_fills_its_outputs_and_no_more(config: Config) -> None:
    given = operands((2, 21, 8, 13), torch.float32)
    x, residual = given["x"], given["added"]
    mean, rstd = batch_statistics(x)
    main = Normed(x, mean, rstd, given["weight"], given["bias"], True)
    beyond = torch.full((2, 2 * x.numel()), float("nan"), device=DEVICE)
    y, grad_x = (row[: x.numel()].view(2, 8, 13, 21).permute(0, 3, 1, 2) for row in beyond)
    launch_forward(y, main, residual, config=config).run()
    norm = Norm(given["weight"].double(), given["bias"].double())
    require_close(y, bn_add_relu_ref(x.double(), norm, residual.double()), "ieee", LONG)
    nothing = torch.zeros(2, 21, device=DEVICE)
    launch_backward(grad_x, None, nothing, residual, y, main, config=config).run()
    scale = (rstd * given["weight"]).double()[:, None, None]
    want = torch.where(y > 0, residual, 0).double() * scale
    require_close(grad_x, want, "ieee", LONG)
    assert bool(beyond[:, x.numel() :].isnan().all())


@pytest.mark.parametrize("config", [*DISTINCT, Config(16, 16, 2, 1)], ids=Config.label)
def test_partials_of_every_configuration_add_up(config: Config) -> None:
    x = 2 * image(2, 21, 13, 17) + 5
    rows = 2 * 13 * 17
    partials = empty_partials(x, -(-rows // config.rows))
    for tensor in partials:
        tensor.fill_(float("nan"))
    launch_partials(x, partials, config).run()
    mean, rstd = batch_statistics(x, partials=partials)
    want_mean, want_rstd = batch_statistics_ref(x.double(), 1e-5)
    require_close(mean, want_mean, "ieee", rows)
    require_close(rstd, want_rstd, "ieee", rows)


def test_statistics_do_not_cancel() -> None:
    """Sums of squares in fp32 would put the variance off by its own size here."""
    x = image(4, 5, 9, 9) + 10_000
    mean, rstd = batch_statistics(x)
    want_mean, want_rstd = batch_statistics_ref(x.double(), 1e-5)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=0)
    # the means of two parts, 0.1 apart, are themselves rounded to 0.001
    torch.testing.assert_close(rstd.double(), want_rstd, rtol=1e-4, atol=0)
    naive = (x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square() + 1e-5).abs().rsqrt()
    assert float((naive / want_rstd - 1).abs().max()) > 0.1


def test_running_statistics_of_half_precision() -> None:
    x = image(3, 6, 4, 5)
    mean, var = torch.zeros(6, device=DEVICE).half(), torch.ones(6, device=DEVICE).half()
    batch_statistics(x, mean, var, momentum=0.25)
    found, unbiased = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    require_close(mean, 0.25 * found, "fp16")
    require_close(var, 0.75 + 0.25 * unbiased, "fp16")


def test_running_statistics_are_seen_to_change() -> None:
    """Their versions go up, by which caches of folded weights notice the change."""
    running = [torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)]
    versions = [tensor._version for tensor in running]
    batch_statistics(image(2, 4, 3, 3), *running)
    assert all(t._version > v for t, v in zip(running, versions, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, interpreting
def test_passes_on_what_is_not_finite() -> None:
    x, grad = image(2, 4, 2, 3), image(2, 4, 2, 3)
    x[0, 1, 1, 1], x[1, 2, 0, 0] = float("nan"), float("inf")
    got, want = (one.detach().requires_grad_() for one in (x, x.double()))
    y = bn_add_relu(got, Norm(None, None))
    exact = bn_add_relu_ref(want, Norm(None, None))
    y.backward(grad)
    exact.backward(grad.double())
    assert got.grad is not None and want.grad is not None
    require_close(y.detach(), exact.detach(), "ieee", LONG)
    require_close(got.grad, want.grad, "ieee", LONG)
    assert bool(want.grad.isnan().any()) and not bool(want.grad.isnan().all())


def test_a_single_value_gets_torchs_own_error() -> None:
    x, norm = image(1, 4, 1, 1), Norm(None, None)
    errors = []
    for op in (bn_add_relu, bn_add_relu_ref):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
            op(x, norm)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_an_empty_batch_in_eval_mode() -> None:
    norm = Norm(*(torch.ones(4, device=DEVICE) for _ in range(4)), training=False)
    x = image(0, 4, 3, 3).requires_grad_()
    y = bn_add_relu(x, norm)
    y.sum().backward()
    assert y.shape == (0, 4, 3, 3) and x.grad is not None and x.grad.shape == x.shape


def test_refuses_a_second_derivative() -> None:
    x = image(2, 4, 3, 3).requires_grad_()
    y = bn_add_relu(x, Norm(None, None))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bn_add_relu has no second derivative; accepted: one"):
        grad.square().sum().backward()


def test_are_well_behaved_operators() -> None:
    x, x2 = image(2, 8, 3, 3).requires_grad_(), image(2, 8, 3, 3).requires_grad_()
    vectors = [torch.rand(8, device=DEVICE) for _ in range(8)]
    for i in (2, 3, 6, 7):
        vectors[i].requires_grad_()
    tail = (*vectors[:4], None, x2, *vectors[4:], True, True, True)
    torch.library.opcheck(bn_add_relu_op, (x, *tail))
    still = [t.detach() for t in vectors]
    torch.library.opcheck(
        bn_add_relu_backward_op,
        (x.detach(), x2.detach(), x.detach(), *still[:3], None, None, None, None, True, False,
         True, True, True),
    )  # fmt: skip
    torch.library.opcheck(bn_partials_op, (x.detach(),))
    partials = bn_partials_op(x.detach())
    torch.library.opcheck(bn_merge_op, (*partials, still[0], still[1], 0.1, 1e-5))


def test_compiles_without_a_graph_break() -> None:
    given = operands((2, 8, 3, 4), torch.float32)

    def twice(*args: Any, **options: Any) -> Tensor:
        return bn_add_relu(*args, **options) * 1

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    got = run(compiled, given, "shortcut")
    want = run(bn_add_relu, given, "shortcut")
    for name, value in want.items():
        assert torch.equal(got[name], value), name  # type: ignore[arg-type]


def test_counts_what_an_element_costs() -> None:
    x, norm = image(2, 8, 3, 4), Norm(None, None)
    for shortcut, added in ((None, "nothing"), ((x, norm), "shortcut")):
        with FlopCounterMode(display=False) as counter:
            bn_add_relu(x, norm, shortcut=shortcut)
        assert counter.get_total_flops() == NormProblem(24, 8, "ieee", added).flops


X, VECTOR = torch.zeros(2, 4, 3, 3), torch.zeros(4)
EVAL = Norm(None, None, VECTOR, VECTOR, training=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "argument x: shape"),
        ({"norm": Norm(torch.zeros(5), None)}, r"argument norm.weight: shape \(5,\)"),
        ({"norm": Norm(None, VECTOR.double())}, "argument norm.bias: torch.float64; accepted"),
        ({"norm": replace(EVAL, running_var=None)}, "argument norm.running_var: None; accepted"),
        ({"residual": X[:, :, :2]}, "argument residual: shape"),
        ({"residual": X.half()}, "argument residual: torch.float16"),
        ({"shortcut": (X[:1], EVAL)}, "argument shortcut: shape"),
        ({"shortcut": (X, Norm(X, None))}, "argument shortcut.weight: shape"),
        ({"residual": X, "shortcut": (X, EVAL)}, "argument shortcut: beside a residual"),
        ({"activation": "silu"}, "argument activation: 'silu'; accepted: identity, relu"),
        ({"x": X.long()}, "argument x: dtype torch.int64"),
        ({"x": X.to("meta"), "norm": EVAL}, "argument norm.running_mean: on cpu; accepted: meta"),
        ({"residual": X.to("meta")}, "argument residual: on meta; accepted: cpu"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bn_add_relu(**({"x": X, "norm": Norm(None, None)} | arguments))


def test_configurations_refuse() -> None:
    with pytest.raises(ValueError, match="argument block_m: 100; accepted"):
        Config(100, 64, 1)
    with pytest.raises(ValueError, match="argument steps: 0"):
        Config(64, 64, 0)
    with pytest.raises(ValueError, match="argument num_warps: 5"):
        Config(64, 64, 1, 5)
    with pytest.raises(ValueError, match=r"pixels in a batch; accepted: less than 2\*\*31"):
        choose_config(NormProblem(1 << 31, 64), 132)


def test_choice_follows_the_problem() -> None:
    large = NormProblem(256 * 56 * 56, 256)
    assert candidates(large) == list(CONFIGS)
    assert choose_config(large, 132) == Config(64, 64, 32)
    assert choose_config(NormProblem(49, 2048), 132) == Config(64, 64, 1)
    assert choose_config(NormProblem(1024, 13), 132) == Config(256, 16, 1)
    assert large.least_bytes == 2 * 2 * large.elements + 16 * 256
    joined = replace(large, added="shortcut")
    assert joined.least_bytes == 3 * 2 * large.elements + 32 * 256


def test_ships_every_kernel_in_every_width() -> None:
    made = [launch for _, launch in shipped()]
    widths = {(m.kernel.fn.__name__, m.constants["BLOCK_C"]) for m in made}
    names = ("forward_kernel", "reduce_kernel", "backward_kernel")
    assert {(name, c.block_c) for name in names for c in DISTINCT} <= widths
    assert {m.args["x_ptr"].dtype for m in made if "x_ptr" in m.args} == set(DTYPES)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", ADDED)
def test_is_right_at_full_size(added: str, dtype: torch.dtype) -> None:
    require_agreement(operands((32, 256, 28, 28), dtype), added)


@pytest.mark.gpu
@NEEDS_GPU
def test_two_runs_give_the_same_bits() -> None:
    given = operands((32, 256, 28, 28), torch.bfloat16)
    first, second = (run(bn_add_relu, given, "shortcut") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name  # type: ignore[arg-type]


def test_torchs_mask_is_ours() -> None:
    """Of y = 0 no gradient passes, of -0.0 neither, of NaN it does."""
    y = torch.tensor([0.0, -0.0, 1e-30, float("nan")], device=DEVICE).reshape(1, 4, 1, 1)
    ones = torch.ones_like(y)
    leaf = y.clone().requires_grad_()
    F.relu(leaf).backward(ones)
    vector = torch.ones(4, device=DEVICE)
    got = bn_add_relu_backward_op(
        ones, y, ones, vector, vector, None, None, None, None, None, False, False, True, False,
        False,
    )[0]  # fmt: skip
    assert torch.equal(got, leaf.grad)  # type: ignore[arg-type]
