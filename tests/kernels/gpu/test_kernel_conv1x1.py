"""The 1x1 convolution: against fp64 in every way it can be fed, and what it refuses."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import exact, require_close, require_close_gradients
from kernel_inputs import DEVICE, DTYPES, NEEDS_GPU, image, poisoned
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.gpu.conv1x1.conv1x1 import Shortcut, conv1x1, conv1x1_op, conv1x1_ref
from resfuse.kernels.gpu.conv1x1.conv1x1_config import (
    CONFIGS,
    Config,
    Conv1x1Problem,
    candidates,
    choose,
)
from resfuse.kernels.gpu.conv1x1.conv1x1_kernel import launch, shipped
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.conv_problem import MATH_MODES, Epilogue, Geometry, dtypes_of, math_mode_of

# n, c, h, w, k, stride: a ResNet shape cut small, primes, one pixel, stride 2 at an odd batch
CASES = {
    "resnet": (2, 16, 4, 6, 32, (1, 1)),
    "prime": (1, 13, 5, 7, 17, (1, 1)),
    "one pixel": (1, 8, 1, 1, 8, (1, 1)),
    "stride 2": (3, 24, 5, 6, 16, (2, 2)),
    "uneven stride": (1, 5, 4, 7, 3, (1, 3)),
}
POINTERS = Config(16, 16, 16, 4, 2, descriptors=False)
DESCRIPTORS = replace(POINTERS, descriptors=True)


def filters(k: int, c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return image(k, c, 1, 1, dtype=dtype) / c**0.5


def reference(*args: Tensor | None, shortcut: Shortcut | None = None, **options: Any) -> Tensor:
    """The twin in fp64, of the same arguments."""
    if shortcut is not None:
        shortcut = Shortcut(shortcut.x.double(), shortcut.weight.double(), shortcut.stride)
    return exact(conv1x1_ref, *args, shortcut=shortcut, **options)


def launched(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    activation: str = "identity",
    *,
    config: Config,
    shortcut: Shortcut | None = None,
    math_mode: str | None = None,
) -> Launch:
    """The launch of one configuration, of stride 1, in the math mode of x's dtype or another."""
    problem = problem_of(x, weight, Geometry(), Epilogue.of(activation, residual is not None))
    problem = replace(problem, dtypes=dtypes_of(math_mode or problem.math_mode))
    return launch(problem, Tensors(x, weight, None, residual, None, y), config, shortcut)


def output_of(x: Tensor, k: int, stride: tuple[int, int] = (1, 1)) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    return n, k, (h - 1) // stride[0] + 1, (w - 1) // stride[1] + 1


@pytest.mark.parametrize("residual", ["none", "first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_fp64(case: str, dtype: torch.dtype, residual: str) -> None:
    n, c, h, w, k, stride = CASES[case]
    x, weight, bias = image(n, c, h, w, dtype=dtype), filters(k, c, dtype), torch.randn(k).to(dtype)
    bias = bias.to(DEVICE)
    added = image(*output_of(x, k, stride), dtype=dtype) if residual != "none" else None
    options = {"stride": stride, "activation": "relu", "residual_last": residual == "last"}
    y = conv1x1(x, weight, bias, added, **options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    require_close(y, reference(x, weight, bias, added, **options), math_mode_of(dtype), c)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_applies_each_activation(activation: str) -> None:
    x, weight, added = 3 * image(1, 8, 3, 5), filters(20, 8), image(1, 20, 3, 5)
    slope: Slope = {"leaky_relu": 0.1, "prelu": torch.rand(20, device=DEVICE)}.get(activation)
    for last in (False, True):
        options = {"activation": activation, "slope": slope, "residual_last": last}
        y = conv1x1(x, weight, None, added, **options)
        want = reference(x, weight, None, added, **options)
        require_close(y, want, math_mode_of(x.dtype), 8)


def test_takes_any_memory_layout() -> None:
    x = torch.randn(2, 8, 5, 7, device=DEVICE)
    weight = torch.randn(8, 6, 1, 1, device=DEVICE).transpose(0, 1)
    added = torch.randn(2, 6, 7, 5, device=DEVICE).transpose(2, 3)
    bias = torch.randn(12, device=DEVICE)[::2]
    y = conv1x1(x, weight, bias, added)
    assert y.is_contiguous(memory_format=torch.channels_last)
    require_close(y, reference(x, weight, bias, added), math_mode_of(x.dtype), 8)
    part = x[:, ::2, 1:, ::3]
    y = conv1x1(part, weight[:, ::2])
    require_close(y, reference(part, weight[:, ::2]), math_mode_of(x.dtype), 4)


def test_reads_rows_that_are_not_aligned() -> None:
    """Descriptors could not; a view may start anywhere."""
    flat = torch.randn(1 + 2 * 3 * 4 * 16, device=DEVICE)
    x = flat[1:].view(2, 3, 4, 16).permute(0, 3, 1, 2)
    weight = filters(8, 16)
    assert x.data_ptr() % 16 != 0
    require_close(conv1x1(x, weight), reference(x, weight), math_mode_of(x.dtype), 16)
    with pytest.raises(ValueError, match="aligned: False"):
        launched(image(2, 8, 3, 4), x, weight, config=DESCRIPTORS)


@pytest.mark.parametrize("config", [DESCRIPTORS, POINTERS], ids=Config.label)
@pytest.mark.parametrize("mode", MATH_MODES)
def test_fills_a_poisoned_output(mode: str, config: Config) -> None:
    """Tiles that stick out on every side; two loops, over x and the shortcut."""
    dtype = MATH_MODES[mode][0]
    x, weight = image(1, 24, 5, 7, dtype=dtype), filters(40, 24, dtype)
    shortcut = Shortcut(image(1, 8, 9, 14, dtype=dtype), filters(40, 8, dtype), (2, 2))
    for side in (
        None,
        shortcut,
        replace(shortcut, x=image(1, 8, 5, 7, dtype=dtype), stride=(1, 1)),
    ):
        y = poisoned(1, 40, 5, 7, dtype=dtype)
        added = y.nan_to_num(2.0)
        launched(y, x, weight, added, shortcut=side, math_mode=mode, config=config).run()
        want = reference(x, weight, residual=torch.full_like(y, 2.0), shortcut=side)
        require_close(y, want, mode, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
def test_folds_a_projection(stride: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = image(2, 8, 3, 4, dtype=dtype), filters(24, 8, dtype), torch.randn(24)
    bias = bias.to(DEVICE)  # fp32 beside 16-bit tensors
    side = image(2, 5, 2 * stride[0] + 1, 3 * stride[1] + 1, dtype=dtype)
    shortcut = Shortcut(side, filters(24, 5, dtype), stride)
    added = image(2, 24, 3, 4, dtype=dtype)
    for last in (False, True):
        options = {"activation": "relu", "shortcut": shortcut, "residual_last": last}
        y = conv1x1(x, weight, bias, added, **options)
        want = reference(x, weight, bias, added, **options)
        require_close(y, want, math_mode_of(dtype), 13)


@pytest.mark.parametrize("config", [DESCRIPTORS, POINTERS], ids=Config.label)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_passes_on_what_is_not_finite(value: float, config: Config) -> None:
    """In x, and beside it: 24 channels leave half a block that must not be multiplied by it."""
    x, weight, added = image(1, 24, 3, 5), filters(8, 24), image(1, 8, 3, 5)
    x[0, 3, 1, 2] = value
    added[0, 2, 0, 0] = value
    y = poisoned(1, 8, 3, 5, dtype=x.dtype)
    launched(y, x, weight, added, "relu", config=config).run()
    want = reference(x, weight, residual=added, activation="relu")
    require_close(y, want, math_mode_of(x.dtype), 24)
    assert bool((want.isnan() | want.isinf()).any())


@settings(max_examples=12)
@given(
    n=st.integers(1, 3), c=st.integers(1, 20), h=st.integers(1, 6), w=st.integers(1, 6),
    k=st.integers(1, 20), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_agrees_on_any_shape(
    n: int, c: int, h: int, w: int, k: int, stride: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight = image(n, c, h, w, dtype=dtype), filters(k, c, dtype)
    y = conv1x1(x, weight, stride=stride)
    require_close(y, reference(x, weight, stride=stride), math_mode_of(dtype), c)


def test_makes_nothing_of_an_empty_batch() -> None:
    assert conv1x1(image(0, 8, 3, 3), filters(16, 8)).shape == (0, 16, 3, 3)


@pytest.mark.parametrize("activation", ["relu", "prelu", "silu"])
@pytest.mark.parametrize("residual_last", [False, True])
def test_gradients_agree_with_fp64(activation: str, residual_last: bool) -> None:
    leaves = {
        "x": image(2, 6, 4, 3), "weight": filters(5, 6), "bias": torch.randn(5, device=DEVICE),
        "residual": image(2, 5, 2, 2), "slope": torch.rand(5, device=DEVICE),
        "side": image(2, 4, 3, 3), "side_weight": filters(5, 4),
    }  # fmt: skip
    upstream = image(2, 5, 2, 2)

    def answer(op: Any, side: Tensor, side_weight: Tensor, **own: Tensor) -> Tensor:
        return op(
            **own, stride=(2, 2), activation=activation, residual_last=residual_last,
            shortcut=Shortcut(side, side_weight, (2, 2)),
        )  # fmt: skip

    ops = partial(answer, conv1x1), partial(answer, conv1x1_ref)
    require_close_gradients(*ops, leaves, upstream, math_mode_of(torch.float32), 400)


def test_is_a_well_behaved_operator() -> None:
    x, weight, bias = image(2, 8, 3, 3), filters(4, 8), torch.randn(4, device=DEVICE)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    arguments = (x, weight, bias, None, None, [2, 2], None, None, [1, 1], "relu", 0.0, False)
    torch.library.opcheck(conv1x1_op, arguments)


def test_compiles_without_a_graph_break() -> None:
    x, weight, side = image(2, 8, 3, 4), filters(16, 8), image(2, 4, 5, 7)
    shortcut_weight = filters(16, 4)

    def block(x: Tensor, side: Tensor) -> Tensor:
        shortcut = Shortcut(side, shortcut_weight, (2, 2))
        return conv1x1(x, weight, activation="silu", shortcut=shortcut) + 1

    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x, side)
    want = reference(x, weight, activation="silu", shortcut=Shortcut(side, shortcut_weight, (2, 2)))
    require_close(got, want + 1, math_mode_of(x.dtype), 12)


def test_counts_flops_of_both_convolutions() -> None:
    with FlopCounterMode(display=False) as counter:
        conv1x1(image(2, 8, 3, 4), filters(16, 8))
        assert counter.get_total_flops() == 2 * 2 * 12 * 16 * 8
        shortcut = Shortcut(image(2, 4, 5, 7), filters(16, 4), (2, 2))
        conv1x1(image(2, 8, 3, 4), filters(16, 8), shortcut=shortcut)
    assert counter.get_total_flops() == 2 * 2 * 12 * 16 * (8 + 8 + 4)
    assert Conv1x1Problem(2, 8, 3, 4, 16, 1, 1, shortcut_c=4).flops == 2 * 2 * 12 * 16 * 12


X, WEIGHT = torch.zeros(1, 4, 3, 3), torch.zeros(6, 4, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "argument x: shape"),
        ({"weight": torch.zeros(6, 4, 3, 3)}, r"argument weight: shape \(6, 4, 3, 3\)"),
        ({"weight": torch.zeros(6, 5, 1, 1)}, r"accepted: \(6, 4, 1, 1\)"),
        ({"weight": WEIGHT.half()}, "argument weight: torch.float16; accepted: torch.float32"),
        ({"bias": torch.zeros(4)}, r"argument bias: shape \(4,\); accepted: \(6,\)"),
        ({"residual": torch.zeros(1, 6, 3, 2)}, "argument residual: shape"),
        ({"stride": (0, 1)}, r"argument stride: \(0, 1\); accepted: two positive numbers"),
        ({"activation": "mish"}, "argument activation: 'mish'"),
        ({"activation": "prelu", "slope": torch.zeros(4)}, "argument slope"),
        ({"shortcut": Shortcut(X, torch.zeros(5, 4, 1, 1))}, "argument shortcut"),
        ({"shortcut": Shortcut(X, WEIGHT, (2, 2))}, r"argument shortcut: .*\[1, 6, 2, 2\]"),
        ({"shortcut": Shortcut(X.half(), WEIGHT.half())}, "argument shortcut.x: torch.float16"),
        ({"x": X.to("meta")}, "argument weight: on cpu; accepted: meta"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv1x1(**({"x": X, "weight": WEIGHT} | arguments))


def test_refuses_a_dtype_no_kernel_computes_in() -> None:
    with pytest.raises(ValueError, match=r"argument x: dtype torch.float64"):
        conv1x1(image(1, 4, 3, 3).double(), filters(6, 4).double())


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_m", 48), ("block_n", 512), ("block_k", 8), ("num_warps", 3), ("num_stages", 0)],
)
def test_configurations_refuse_values(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"argument {field}: {value}; accepted: "):
        replace(POINTERS, **{field: value})


RESNET = Conv1x1Problem(256, 64, 56, 56, 256, 1, 1)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            replace(RESNET, geometry=RESNET.geometry._replace(stride=(2, 2))),
            "descriptors at stride",
        ),
        (replace(RESNET, c=63), "descriptors for rows of"),
        (replace(RESNET, k=100), "descriptors for rows of"),
        (replace(RESNET, aligned=False), "aligned: False"),
        (replace(RESNET, r=3, s=3), "accepted: 1x1"),
        (replace(RESNET, geometry=RESNET.geometry._replace(groups=2)), "one group"),
        (replace(RESNET, geometry=RESNET.geometry._replace(padding=(1, 1))), "no padding"),
    ],
)
def test_configurations_refuse_problems(problem: Conv1x1Problem, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DESCRIPTORS.check(problem)


@pytest.mark.parametrize("mode", MATH_MODES)
def test_candidates_are_valid_and_fit(mode: str) -> None:
    for problem in (
        RESNET,
        replace(RESNET, c=63),
        replace(RESNET, k=3, geometry=RESNET.geometry._replace(stride=(2, 2))),
    ):
        found = candidates(replace(problem, dtypes=dtypes_of(mode)))
        assert found
        for config in found:
            assert config in CONFIGS
            config.check(replace(problem, dtypes=dtypes_of(mode)))
            assert config.shared_bytes(replace(problem, dtypes=dtypes_of(mode))) <= 163 << 10
            if problem != RESNET:
                assert not config.descriptors


def test_choice_follows_the_problem() -> None:
    deep = replace(RESNET, c=256)
    assert choose(deep, 132).label() == "128x128x64 w8 s3 descriptors"
    assert choose(deep, 132, (8, 0)).label() == "128x128x64 w8 s3 pointers"
    assert (
        choose(RESNET, 132).label() == "128x128x64 w4 s2 descriptors"
    )  # one step: no third buffer
    assert choose(replace(deep, k=64), 132).label() == "128x64x64 w4 s3 descriptors"
    assert (
        choose(replace(deep, geometry=deep.geometry._replace(stride=(2, 2))), 132).label()
        == "128x128x64 w8 s3 pointers"
    )
    assert choose(replace(deep, n=1, h=7, w=7), 132).label() == "64x64x64 w4 s4 descriptors"
    assert (
        choose(replace(RESNET, dtypes=dtypes_of("ieee")), 132).label() == "64x64x32 w4 s4 pointers"
    )


def test_ships_every_configuration() -> None:
    labels = [label for label, _ in shipped()]
    assert len(set(labels)) == len(labels)
    for mode in MATH_MODES:
        for config in candidates(replace(RESNET, c=256, dtypes=dtypes_of(mode))):
            assert sum(label.startswith(f"{mode} {config.label()}") for label in labels) == 2


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("mode", MATH_MODES)
def test_every_configuration_is_right_at_full_size(mode: str) -> None:
    dtype = MATH_MODES[mode][0]
    arch = 10 * torch.cuda.get_device_capability()[0]
    x, weight = image(8, 128, 28, 28, dtype=dtype), filters(512, 128, dtype)
    shortcut = Shortcut(image(8, 256, 56, 56, dtype=dtype), filters(512, 256, dtype), (2, 2))
    added = image(8, 512, 28, 28, dtype=dtype)
    want = reference(x, weight, residual=added, activation="relu", shortcut=shortcut)
    problem = Conv1x1Problem(8, 128, 28, 28, 512, 1, 1, shortcut_c=256, dtypes=dtypes_of(mode))
    for config in candidates(problem):
        y = poisoned(8, 512, 28, 28, dtype=dtype)
        made = launched(
            y, x, weight, added, "relu", shortcut=shortcut, math_mode=mode, config=config
        )
        if made.least_capability <= arch:
            made.run()
            require_close(y, want, mode, 384)
