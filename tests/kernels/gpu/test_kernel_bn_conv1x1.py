"""A 1x1 convolution that normalises what it loads: against torch's layers in fp64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import require_close
from kernel_inputs import DEVICE, DTYPES, NEEDS_GPU, image
from resfuse.kernels.gpu.batch_norm.batch_statistics import batch_statistics, batch_statistics_ref
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import empty_partials
from resfuse.kernels.gpu.batch_norm.bn_add_relu import Norm
from resfuse.kernels.gpu.batch_norm.bn_conv1x1 import (
    CONFIGS,
    Config,
    bn_conv1x1,
    bn_conv1x1_op,
    bn_conv1x1_ref,
    candidates,
    choose,
    launch,
    problem_of,
)
from resfuse.kernels.ops.conv_problem import math_mode_of

# n, c, h, w, k: a ResNet shape cut small, primes, one pixel an image, channels past two steps
SHAPES = [(2, 64, 4, 6, 96), (3, 13, 5, 7, 17), (9, 8, 1, 1, 16), (2, 70, 3, 3, 5)]


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    n, c, h, w, k = shape
    given = {"x": (2 * image(n, c, h, w) + 1).to(dtype)}
    given |= {"filters": (image(k, c, 1, 1) / c**0.5).to(dtype)}
    return given | {name: torch.rand(c, device=DEVICE) + 0.5 for name in ("weight", "bias")}


def run(
    op: Any, given: dict[str, Tensor], dtype: torch.dtype | None = None, *,
    training: bool = True, activation: str = "relu",
) -> dict[str, Tensor]:  # fmt: skip
    own = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in given.items()}
    running = [torch.full_like(own["bias"].detach(), value) for value in (0.5, 2.0)]
    norm = Norm(own["weight"], own["bias"], *running, training=training)
    y, partials = op(own["x"], norm, own["filters"], activation=activation)
    mean, rstd = batch_statistics(y.detach(), partials=partials)
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, device=DEVICE).to(given["x"].dtype)
    y.backward(upstream.to(y.dtype))
    grads = {f"grad of {name}": leaf.grad for name, leaf in own.items()}
    statistics = {"mean of y": mean, "rstd of y": rstd}
    buffers = {"running_mean": running[0], "running_var": running[1]}
    return {"y": y.detach(), **grads, **statistics, **buffers}  # type: ignore[dict-item]


@pytest.mark.parametrize("options", [{}, {"training": False}, {"activation": "identity"}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_fp64(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    given = operands(shape)
    got, want = (
        run(bn_conv1x1, given, **options),
        run(bn_conv1x1_ref, given, torch.float64, **options),
    )
    for name, exact in want.items():
        require_close(got[name], exact, "ieee", 2000)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_agrees_in_half_precision(dtype: torch.dtype) -> None:
    """What is multiplied was rounded once after it was normalised, as in torch."""
    given = operands((3, 24, 5, 7, 40), dtype)
    got, want = run(bn_conv1x1, given), run(bn_conv1x1_ref, given, torch.float64)
    for name in ("y", "grad of x", "grad of filters"):
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert float(error) < {"fp16": 1e-3, "bf16": 8e-3}[math_mode_of(dtype)], name
    for name in ("running_mean", "running_var"):
        require_close(got[name], want[name], "ieee", 100)
    mean, rstd = batch_statistics_ref(got["y"].double(), 1e-5)
    require_close(got["mean of y"], mean, "ieee", 100)
    require_close(got["rstd of y"], rstd, "ieee", 100)


def test_gradient_formula_against_finite_differences() -> None:
    given = operands((2, 3, 2, 3, 4))
    leaves = [given[name].double().requires_grad_() for name in ("x", "weight", "bias", "filters")]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, filters: bn_conv1x1(x, Norm(weight, bias), filters)[0], leaves
    )


@pytest.mark.parametrize("config", [*CONFIGS["ieee"], Config(16, 16, 16, 1, 1)], ids=Config.label)
def test_fills_poisoned_outputs_and_no_more(config: Config) -> None:
    given = operands((2, 21, 5, 7, 33))
    x, filters = given["x"], given["filters"]
    beyond = torch.full((2 * 2 * 35 * 33,), float("nan"), device=DEVICE)
    y = beyond[: 2 * 35 * 33].view(2, 5, 7, 33).permute(0, 3, 1, 2)
    partials = empty_partials(y, config.tiles(problem_of(x, filters, "ieee"))[0])
    for tensor in partials:
        tensor.fill_(float("nan"))
    mean, rstd = batch_statistics(x)
    vectors = mean, rstd, given["weight"], given["bias"]
    launch(y, partials, x, vectors, filters, config).run()
    norm = Norm(given["weight"].double(), given["bias"].double())
    require_close(y, bn_conv1x1_ref(x.double(), norm, filters.double())[0], "ieee", 400)
    assert float(partials.counts.sum()) == 70
    assert bool(beyond[y.numel() :].isnan().all())


def test_keeps_only_what_it_reads() -> None:
    """Not the normalised image, which eager torch keeps for the convolution's gradient."""
    given = operands((2, 64, 4, 6, 96))
    x = given["x"].requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        bn_conv1x1(x, Norm(given["weight"], given["bias"]), given["filters"])
    assert sorted(kept.values())[-2:] == sorted([given["filters"].numel(), x.numel()])


def test_is_a_well_behaved_operator() -> None:
    given = operands((2, 8, 3, 3, 16))
    x, filters, weight, bias = (t.requires_grad_() for t in given.values())
    mean, rstd = batch_statistics(x.detach())
    torch.library.opcheck(bn_conv1x1_op, (x, mean, rstd, weight, bias, filters, True, True))


def test_refuses_a_second_derivative() -> None:
    given = operands((2, 8, 3, 3, 16))
    x = given["x"].requires_grad_()
    y, _ = bn_conv1x1(x, Norm(None, None), given["filters"])
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_counts_the_convolution() -> None:
    given = operands((2, 8, 3, 4, 16))
    with FlopCounterMode(display=False) as counter:
        bn_conv1x1(given["x"], Norm(None, None), given["filters"])
    assert counter.get_total_flops() == 2 * 2 * 8 * 12 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(8, 4, 4)}, "argument x: shape"),
        ({"norm": Norm(torch.zeros(5), None)}, "argument norm.weight: shape"),
        ({"filters": torch.zeros(4, 8, 3, 3)}, r"argument filters: .*accepted: \(4, 8, 1, 1\)"),
        ({"filters": torch.zeros(4, 8, 1, 1).half()}, "argument filters: torch.float16"),
        ({"activation": "silu"}, "argument activation: 'silu'; accepted: identity, relu"),
    ],
)  # fmt: skip
def test_refuses(arguments: dict, message: str) -> None:
    given = {"x": torch.zeros(2, 8, 4, 4), "norm": Norm(None, None),
             "filters": torch.zeros(4, 8, 1, 1)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        bn_conv1x1(**(given | arguments))


def test_choice_follows_the_problem() -> None:
    x, filters = torch.empty(256, 64, 56, 56, device="meta"), torch.empty(256, 64, 1, 1)
    large = problem_of(x, filters, "fp16")
    assert choose(large, 132) == CONFIGS["fp16"][0]
    assert choose(replace(large, n=1, h=7, w=7), 132) == CONFIGS["fp16"][-1]
    assert candidates(replace(large, k=40))[0].block_n == 64
    assert candidates(replace(large, k=8)) == [CONFIGS["fp16"][-1]]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_right_at_full_size(dtype: torch.dtype) -> None:
    given = operands((32, 64, 56, 56, 256), dtype)
    got, want = run(bn_conv1x1, given), run(bn_conv1x1_ref, given, torch.float64)
    for name, exact in want.items():
        error = float((got[name].double() - exact).norm() / exact.norm())
        assert (
            error < {"ieee": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}[math_mode_of(dtype)]
        ), name
