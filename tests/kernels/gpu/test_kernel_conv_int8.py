"""conv_int8: the kernel against its twin, bit for bit, in the interpreter or on a GPU; and as an
operation of torch's. Sizes are tiny, as in test_kernel_conv.py, and ragged in every direction.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernel_inputs import DEVICE, NEEDS_GPU
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.conv.conv_config import LOOPS, Config, candidates, choose
from resfuse.kernels.gpu.conv1x1 import conv1x1_config
from resfuse.kernels.gpu.conv_int8 import conv1x1_int8_kernel
from resfuse.kernels.gpu.conv_int8 import conv_int8 as module
from resfuse.kernels.gpu.conv_int8 import conv_int8_kernel as kernel
from resfuse.kernels.gpu.conv_int8.conv_int8 import conv_int8, conv_int8_ref
from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import Tensors, offsets, resnet50_problems
from resfuse.kernels.gpu.inspect import inspect
from resfuse.kernels.gpu.inspect.disassembly import disassemble
from resfuse.kernels.gpu.inspect.inspect import compile_launch, inspect_launch
from resfuse.kernels.gpu.inspect.targets import DEFAULT_TARGETS, TARGETS
from resfuse.kernels.ops.activation import ACTIVATIONS
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of
from resfuse.kernels.ops.quantization import (
    INT32_PRODUCTS,
    Quantization,
    Requantization,
    conv_ref,
    less_128,
    plus_128,
    requantization,
)
from without_interpreter import printed_by

pytestmark = pytest.mark.slow
EXACT = {"identity", "relu", "relu6", "leaky_relu", "prelu"}  # neither exp nor a division
DENSE, SAME = Geometry(), Geometry(padding=(1, 1))


class Given(NamedTuple):
    """The arguments of conv_int8 up to `stored`."""

    x: Tensor
    weight: Tensor
    how: Requantization
    stored: Quantization


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return channels_last(values.to(DEVICE))


def quantised(
    x_shape: tuple[int, ...], k: int, window: tuple[int, int], zero_point: int = 0, groups: int = 1
) -> Given:
    """Values and weights of full range, whose sums make numbers of about one."""
    generator = torch.Generator().manual_seed(0)
    shape = (k, x_shape[1] // groups, *window)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    stored = Quantization(0.017, zero_point)
    scale = torch.rand(k, generator=generator).double() + 0.5
    scale = scale / (stored.scale * 74 * 74 * weight[0].numel() ** 0.5)
    how = requantization(weight, scale, torch.randn(k, generator=generator), stored)
    on_device = Requantization(*(t.to(DEVICE) for t in how))
    return Given(drawn(x_shape), channels_last(weight.to(DEVICE)), on_device, stored)


def require_same(got: Tensor, want: Tensor, activation: str = "relu") -> None:
    """The same bits; but where an activation calls exp or divides, less than one of a thousand may
    be a step of int8 off, and a float32 by some units of its last place, or of the last place of
    two, which gelu takes from each other.
    """
    assert got.dtype == want.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    if activation in EXACT:
        assert torch.equal(got, want), f"{(got != want).sum()} of {want.numel()} differ"
    elif got.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=4 * 2**-23, atol=4 * 2**-22)
    else:
        apart = (got.int() - want.int()).abs()
        assert apart.max() <= 1 and (apart > 0).sum() < max(1, want.numel() / 1000)


SHAPES: dict[str, tuple[tuple[int, ...], int, tuple[int, int], Geometry]] = {
    "resnet 3x3": ((2, 32, 7, 7), 32, (3, 3), SAME),
    "resnet 3x3 / 2": ((1, 32, 8, 8), 48, (3, 3), Geometry((2, 2), (1, 1))),
    "resnet stem": ((1, 3, 13, 11), 16, (7, 7), Geometry((2, 2), (3, 3))),
    "primes": ((3, 13, 7, 5), 11, (3, 3), SAME),
    "one pixel": ((1, 40, 1, 1), 16, (3, 3), SAME),  # taps lie outside on all sides at once
    "one of everything": ((1, 1, 1, 1), 1, (1, 1), Geometry()),
    "1x1": ((1, 40, 5, 7), 24, (1, 1), Geometry()),
    "1x1, descriptors": ((2, 80, 5, 7), 96, (1, 1), Geometry()),
    "1x1, one tile": ((1, 16, 3, 3), 16, (1, 1), Geometry()),
    "1x1 / 2": ((1, 40, 5, 7), 24, (1, 1), Geometry((2, 2))),
    "dilation 2": ((1, 16, 7, 6), 16, (3, 3), Geometry((1, 1), (2, 2), (2, 2))),
    "no two alike": ((1, 16, 9, 11), 16, (3, 2), Geometry((2, 3), (2, 1), (1, 3))),
    "padding beyond the filter": ((1, 4, 2, 2), 8, (1, 1), Geometry(padding=(3, 3))),
    "resnext, 4 channels a group": ((1, 64, 5, 5), 64, (3, 3), SAME._replace(groups=16)),
    "groups a tile does not hold evenly": ((1, 30, 4, 5), 20, (3, 3), Geometry(groups=5)),
    "depthwise": ((1, 24, 5, 7), 24, (3, 3), SAME._replace(groups=24)),
}  # fmt: skip


@pytest.mark.parametrize("zero_point", [0, 113, 128, 255])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_its_twin_on_every_kind_of_shape(shape: str, zero_point: int) -> None:
    x_shape, k, window, geometry = SHAPES[shape]
    given = quantised(x_shape, k, window, zero_point, geometry.groups)
    output = Quantization(0.02, 71)
    got = conv_int8(*given, output, geometry)
    want = conv_ref(*given, output, geometry)
    require_same(got, channels_last(want))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("place", ["none", "before", "after"])
@pytest.mark.parametrize("output", [Quantization(0.03, 90), None], ids=["int8", "fp32"])
@pytest.mark.parametrize("channels", [40, 48], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_the_residual_in_every_place(
    activation: str, channels: int, output: Quantization | None, place: str
) -> None:
    given = quantised((1, channels, 5, 8), 32, (1, 1), 5)
    slope = {"leaky_relu": 0.2, "prelu": torch.linspace(-1, 1, 32, device=DEVICE)}.get(activation)
    residual = None if place == "none" else drawn((1, 32, 5, 8), 1)
    stored = None if residual is None else Quantization(0.011, 140)
    options = Geometry(), activation, slope, residual, stored, place == "after"
    got = conv_int8(*given, output, *options)
    require_same(got, channels_last(conv_ref(*given, output, *options)), activation)


@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_what_does_not_fit_is_clipped_at_both_ends(zero_point: int) -> None:
    given = quantised((1, 40, 5, 7), 24, (1, 1), 40)
    output = Quantization(1e-4, zero_point)
    got = conv_int8(*given, output)
    want = channels_last(conv_ref(*given, output, Geometry()))
    require_same(got, want)
    ends = {0} if zero_point == 0 else {255} if zero_point == 255 else {0, 255}
    assert ends <= set(want.unique().tolist())


def test_halfway_goes_to_the_even() -> None:
    """Sums of one product each, in steps of half a unit, either side of zero."""
    x = channels_last(torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 16, 16))
    weight = torch.ones(1, 1, 1, 1, dtype=torch.int8, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    how = Requantization(one, 0 * one, torch.tensor([-128], dtype=torch.int32, device=DEVICE))
    got = conv_int8(x, weight, how, Quantization(1.0, 128), Quantization(2.0, 128))
    want = (torch.arange(-128, 128, dtype=torch.float64) / 2).round() + 128
    assert torch.equal(got.flatten().cpu().double(), want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_nan_and_infinity_are_stored_as_the_twin_stores_them() -> None:
    x, weight, how, stored = quantised((1, 16, 3, 3), 16, (1, 1), 7)
    how.scale[:8] = 3e38  # the products are infinite, of either sign, and silu of -inf is NaN
    for activation in ("identity", "relu", "silu"):
        given = x, weight, how, stored, Quantization(0.02, 90), Geometry(), activation
        require_same(conv_int8(*given), channels_last(conv_ref(*given)))


@pytest.mark.parametrize("output", [Quantization(0.02, 70), None], ids=["int8", "fp32"])
def test_values_may_be_given_less_128(output: Quantization | None) -> None:
    given = quantised((1, 20, 5, 6), 24, (3, 3), 9)
    residual, stored = drawn((1, 24, 5, 6), 1), Quantization(0.01, 3)
    rest = output, SAME, "relu", None
    want = conv_int8(*given, *rest, residual, stored)
    signed = given._replace(x=less_128(given.x))
    got = conv_int8(*signed, *rest, less_128(residual), stored)
    assert got.dtype == (torch.float32 if output is None else torch.int8)
    assert torch.equal(plus_128(got) if output else got, want)
    require_same(conv_int8_ref(*signed, *rest, less_128(residual), stored), got)


@pytest.mark.parametrize("layout", ["NCHW", "sliced", "transposed"])
def test_any_memory_layout_is_taken(layout: str) -> None:
    given = quantised((2, 16, 5, 6), 16, (3, 3), 9)
    residual, stored = drawn((2, 16, 3, 4), 1), Quantization(0.01, 3)
    view = {
        "NCHW": lambda t: t.contiguous(),
        "sliced": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    rest = Quantization(0.02, 70), Geometry(), "relu", None
    other = given._replace(x=view(given.x), weight=view(given.weight))
    got = conv_int8(*other, *rest, view(residual), stored)
    assert torch.equal(got, conv_int8(*given, *rest, residual, stored))


def test_an_empty_batch_gives_an_empty_answer() -> None:
    given = quantised((0, 16, 5, 5), 16, (3, 3))
    assert conv_int8(*given, Quantization(1.0, 0)).shape == (0, 16, 3, 3)


def launched(
    given: Given, config: Config | conv1x1_config.Config, geometry: Geometry, output: Quantization
) -> Tensor:
    """y as one configuration fills it, with bytes before and behind it that must stay."""
    x, weight, how, stored = given
    (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
    epilogue = Epilogue("relu")
    problem = ConvProblem(n, c, h, w, k, r, s, geometry, epilogue, dtypes_of("int8"))
    size, guard = problem.n * problem.p * problem.q * problem.k, 64
    memory = torch.full((size + 2 * guard,), 99, dtype=torch.int8, device=x.device)
    y = memory[guard:-guard].view(problem.n, problem.p, problem.q, problem.k).permute(0, 3, 1, 2)
    table = offsets(weight, stored, geometry)
    tensors = Tensors(less_128(x), weight, table, how.scale, how.bias, None, None, y)
    if isinstance(config, Config):
        kernel.launch(problem, tensors, config, output=output).run()
    else:
        gemm = conv1x1_int8_kernel.gemm(problem, tensors)
        conv1x1_int8_kernel.launch(gemm, tensors, config, output=output).run()
    assert (memory[:guard] == 99).all() and (memory[-guard:] == 99).all()
    return plus_128(y)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("group_m", [1, 2])
def test_every_element_is_written_and_none_beyond(loop: str, group_m: int) -> None:
    # 3 tiles of pixels by 3 of channels by 2 blocks of channels, the last of each ragged
    given = quantised((1, 40, 5, 7), 40, (3, 3), 30)
    config = Config(16, 16, 32, loop=loop, group_m=group_m)
    output = Quantization(0.02, 0)
    got = launched(given, config, SAME, output)
    require_same(got, channels_last(conv_ref(*given, output, SAME, "relu")))


def test_every_element_is_written_by_descriptors_and_none_beyond() -> None:
    given = quantised((1, 80, 5, 7), 48, (1, 1), 30)
    config = conv1x1_config.Config(16, 32, 32, 4, 2, descriptors=True)
    output = Quantization(0.02, 0)
    got = launched(given, config, Geometry(), output)
    require_same(got, channels_last(conv_ref(*given, output, Geometry(), "relu")))


def test_descriptors_are_chosen_where_rows_are_aligned_and_hopper_runs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(c: int, k: int, window: int = 1, geometry: Geometry = DENSE) -> str:
        dtypes = dtypes_of("int8")
        problem = ConvProblem(1, c, 8, 8, k, window, window, geometry, dtypes=dtypes)
        launch = module.launch_chosen(problem, kernel.stand_ins(problem))
        return launch.kernel.fn.__name__

    assert chosen(64, 256) == chosen(16, 16) == "conv1x1_int8_kernel"
    for other in (chosen(40, 64), chosen(64, 40), chosen(64, 64, 3)):
        assert other == "conv_int8_kernel"
    assert chosen(64, 64, geometry=Geometry((2, 2))) == "conv_int8_kernel"
    assert chosen(64, 64, geometry=SAME) == "conv_int8_kernel"
    monkeypatch.setattr(module, "capability", lambda device: (8, 0))
    assert chosen(64, 256) == "conv_int8_kernel"


@settings(max_examples=15)
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 6),
    k=st.integers(1, 6),
    groups=st.integers(1, 4),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    zero_point=st.integers(0, 255),
)
def test_any_shape(
    n: int, c: int, k: int, groups: int, size: tuple[int, int], window: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], zero_point: int,
) -> None:  # fmt: skip
    # large enough for the filter, whichever was drawn
    h, w = (max(size[i], dilation[i] * (window[i] - 1) + 1 - 2 * padding[i], 1) for i in (0, 1))
    given = quantised((n, c * groups, h, w), k * groups, window, zero_point, groups)
    geometry = Geometry(stride, padding, dilation, groups)
    output = Quantization(0.02, 100)
    require_same(
        conv_int8(*given, output, geometry), channels_last(conv_ref(*given, output, geometry))
    )


def test_the_offset_of_a_pixel_inside_is_that_of_the_cpu_less_128_of_the_weights() -> None:
    _, weight, how, stored = quantised((1, 16, 7, 7), 16, (3, 3), 9)
    table = offsets(weight, stored, SAME)
    assert table.shape == (16, 16)  # above or not, below, on the left, on the right
    assert torch.equal(table[0], how.offset + 128 * weight.sum((1, 2, 3), dtype=torch.int32))
    assert torch.equal(table[0b1001], (128 - 9) * weight[:, :, 1:, :2].sum((1, 2, 3)).int())
    assert offsets(weight, Quantization(1.0, 128), SAME).shape == (1, 16)
    assert offsets(weight, stored, Geometry()).shape == (1, 16)


def test_where_no_kernel_runs_the_twin_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    monkeypatch.setattr(module, "launch_chosen", None)  # would fail if it were reached
    given = quantised((1, 16, 5, 5), 16, (3, 3), 9)
    rest = Quantization(0.02, 70), SAME, "leaky_relu", 0.1
    require_same(conv_int8(*given, *rest), channels_last(conv_ref(*given, *rest)))
    signed = given._replace(x=less_128(given.x))
    require_same(conv_int8(*signed, *rest), less_128(channels_last(conv_ref(*given, *rest))))


def test_configurations_fit_tensor_cores_of_bytes() -> None:
    for problem in resnet50_problems():
        fitting = candidates(problem)
        assert choose(problem, 132, kernel="conv_int8") in fitting
        with pytest.raises(ValueError, match="16 bytes a step with int8; accepted: 32"):
            replace(fitting[0], block_k=16).check(problem)


@pytest.mark.parametrize("output", [Quantization(0.02, 70), None], ids=["int8", "fp32"])
def test_torch_finds_the_op_well_formed(output: Quantization | None) -> None:
    x, weight, how, stored = quantised((1, 16, 4, 4), 16, (3, 3), 9)
    pair = None if output is None else (output.scale, float(output.zero_point))
    arguments = (
        x, weight, how.scale, how.bias, drawn((1, 16, 4, 4), 1), None, 0.0,
        (stored.scale, 9.0), (0.01, 3.0), pair, (1, 1), (1, 1), (1, 1), 1, "relu", False,
    )  # fmt: skip
    torch.library.opcheck(module.conv_int8_op, arguments)


def test_it_compiles_into_one_graph() -> None:
    x, weight, how, stored = quantised((1, 16, 5, 5), 16, (3, 3), 9)
    output = Quantization(0.02, 70)

    def network(x: Tensor) -> Tensor:
        y = conv_int8(x, weight, how, stored, output, SAME, "relu")
        return conv_int8(y, weight, how, output, None, SAME) * 2

    got = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, network(x))


def test_flops_are_counted_as_for_torchs_own_convolution() -> None:
    given = quantised((1, 32, 5, 5), 16, (3, 3), groups=4)
    with FlopCounterMode(display=False) as counter:
        conv_int8(*given, None, SAME._replace(groups=4))
    assert counter.get_total_flops() == 2 * 5 * 5 * 16 * 8 * 9


LONG = INT32_PRODUCTS // 9 + 1  # channels, of which a 3x3 has too many products
BYTES = torch.zeros(1, 16, 4, 4, dtype=torch.uint8)
WEIGHT = torch.zeros(8, 16, 3, 3, dtype=torch.int8)
HOW = Requantization(torch.ones(8), torch.zeros(8), torch.zeros(8, dtype=torch.int32))
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("argument x: torch.float32; accepted: torch.uint8", {"x": BYTES.float()}),
    "three dimensions": ("argument x: ", {"x": BYTES[0]}),
    "other channels": ("argument weight: shape", {"weight": WEIGHT[:, 1:]}),
    "unsigned weights": ("argument weight: torch.uint8", {"weight": WEIGHT.to(torch.uint8)}),
    "filter too large": ("argument weight: a filter", {"weight": WEIGHT.new_zeros(8, 16, 5, 3)}),
    "groups": ("argument groups: 3", {"geometry": Geometry(groups=3)}),
    "stride": (r"argument stride: \(0, 1\)", {"geometry": Geometry((0, 1))}),
    "scale": (r"argument how.scale: shape \(9,\)", {"how": HOW._replace(scale=torch.ones(9))}),
    "bias": ("argument how.bias: torch.float64", {"how": HOW._replace(bias=HOW.bias.double())}),
    "residual": ("argument residual: shape", {"residual": BYTES, "residual_stored": "x"}),
    "residual's dtype": (
        "argument residual: torch.int8; accepted: torch.uint8",
        {"residual": torch.zeros(1, 8, 2, 2, dtype=torch.int8)},
    ),
    "residual not said how": (
        "argument residual_stored: None with a residual; accepted: both",
        {"residual": torch.zeros(1, 8, 2, 2, dtype=torch.uint8)},
    ),
    "no residual": ("argument residual_stored: .* with no residual", {"residual_stored": "x"}),
    "activation": ("argument activation: 'mish'", {"activation": "mish"}),
    "slope": ("argument slope: shape", {"activation": "prelu", "slope": torch.zeros(7)}),
    "too many products": (
        f"argument weight: {9 * LONG} products a sum; accepted: {INT32_PRODUCTS}",
        {"x": BYTES.new_zeros(1, LONG, 3, 3), "weight": WEIGHT.new_zeros(8, LONG, 3, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_it_cannot_take_is_named(case: str) -> None:
    message, changed = WRONG[case]
    stored = Quantization(1.0, 0)
    given = {"x": BYTES, "weight": WEIGHT, "how": HOW, "stored": stored, "output": None} | changed
    with pytest.raises(ValueError, match=message):
        conv_int8(**given)


def inspect_some() -> None:
    """Prints what is wrong with a few launches for every GPU, which of their instructions multiply
    matrices, and how many contract a product and a sum."""
    dtypes = dtypes_of("int8")
    problems = [
        ConvProblem(32, 64, 56, 56, 64, 3, 3, SAME, dtypes=dtypes),
        ConvProblem(32, 128, 28, 28, 512, 1, 1, epilogue=Epilogue("relu", "before"), dtypes=dtypes),
        ConvProblem(32, 512, 28, 28, 1024, 1, 1, Geometry((2, 2)), dtypes=dtypes),
        ConvProblem(32, 3, 224, 224, 64, 7, 7, Geometry((2, 2), (3, 3)), dtypes=dtypes),
    ]
    told = []
    for problem in problems:
        launch = module.launch_chosen(problem, kernel.stand_ins(problem))
        for target in DEFAULT_TARGETS:
            gpu = TARGETS[target].gpu
            if launch.least_capability > gpu.arch:
                continue
            found = inspect_launch("conv_int8", problem.label(), launch, target)
            (listing,) = disassemble([compile_launch(launch, gpu).asm["cubin"]], gpu.arch)
            wrong = [*inspect.problems(found), *["register operand"] * found.register_operands]
            used = sorted(set(re.findall(r"\b(IMMA\.16832\.S8|IGMMA|UTCIMMA)", listing)))
            told.append([wrong, used, len(re.findall(r"\bFFMA", listing))])
    print(json.dumps(told))


def test_it_compiles_to_integer_tensor_cores_and_sums_after_rounding(tmp_path: Path) -> None:
    told = json.loads(printed_by("test_kernel_conv_int8", "inspect_some", tmp_path))
    wanted = [["IMMA.16832.S8"], ["IGMMA"], ["UTCIMMA"]]
    wanted = [*wanted, *wanted[1:], *wanted, *wanted]  # there are descriptors from Hopper on
    assert told == [[[], used, 0] for used in wanted]


@pytest.mark.gpu
@NEEDS_GPU
def test_every_candidate_is_right_at_full_size() -> None:
    output = Quantization(0.02, 0)
    for problem in resnet50_problems():
        if problem.n == 256:  # the kernels of 32, on more tiles
            continue
        size = (problem.n, problem.c, problem.h, problem.w)
        given = quantised(size, problem.k, (problem.r, problem.s), 3, problem.groups)
        want = channels_last(conv_ref(*given, output, problem.geometry, "relu"))
        for config in candidates(problem):
            require_same(launched(given, config, problem.geometry, output), want)
