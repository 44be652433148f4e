"""The stem: convolution, ReLU and max-pool against fp64, at every kind of border."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import exact, require_close, require_close_gradients
from kernel_inputs import DEVICE, DTYPES, NEEDS_GPU, image, poisoned
from resfuse.kernels.gpu.stem.stem import stem, stem_op, stem_ref
from resfuse.kernels.gpu.stem.stem_config import CONFIGS, Config, StemProblem, candidates, choose
from resfuse.kernels.gpu.stem.stem_kernel import launch, pack_weight, shipped, window_width
from resfuse.kernels.ops.conv_problem import MATH_MODES, math_mode_of

pytestmark = pytest.mark.slow

# n, c, h, w, k: an ImageNet shape cut small, primes, one pixel, and every C
CASES = {
    "imagenet": (2, 3, 16, 16, 16),
    "prime": (1, 3, 17, 23, 13),
    "one pixel": (1, 3, 1, 1, 4),
    "one row": (3, 1, 1, 13, 5),
    "two channels": (1, 2, 9, 6, 8),
    "four channels": (1, 4, 10, 7, 8),
}
SMALL = Config(16, 16, 2, 4)
reference = partial(exact, stem_ref)


def filters(k: int, c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return image(k, c, 7, 7, dtype=dtype) / (49 * c) ** 0.5


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_fp64(case: str, dtype: torch.dtype, with_bias: bool) -> None:
    n, c, h, w, k = CASES[case]
    x, weight = image(n, c, h, w, dtype=dtype), filters(k, c, dtype)
    bias = torch.randn(k, device=DEVICE) if with_bias else None  # fp32 beside 16-bit tensors
    y = stem(x, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    require_close(y, reference(x, weight, bias), math_mode_of(dtype), 49 * c)


def test_takes_any_memory_layout() -> None:
    x = torch.randn(2, 3, 14, 22, device=DEVICE)[:, :, 1:, ::2]
    weight = torch.randn(7, 7, 3, 5, device=DEVICE).permute(3, 2, 0, 1) / 12
    bias = torch.randn(10, device=DEVICE)[::2]
    y = stem(x, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    require_close(y, reference(x, weight, bias), math_mode_of(x.dtype), 147)


@pytest.mark.parametrize("mode", MATH_MODES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fills_a_poisoned_output(rows: int, mode: str) -> None:
    """Strips that end inside the image and beyond it, tiles that hold several images; 20 filters
    leave part of a tile."""
    dtype = MATH_MODES[mode][0]
    x, weight, bias = image(2, 3, 18, 9, dtype=dtype), filters(20, 3, dtype), torch.randn(20)
    bias = bias.to(DEVICE)
    y = poisoned(2, 20, 5, 3, dtype=dtype)
    config = replace(SMALL, rows=rows)
    launch(y, x, pack_weight(weight), bias, math_mode=mode, config=config).run()
    require_close(y, reference(x, weight, bias), mode, 147)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("column", [0, 3, 4, 5, 6])
@pytest.mark.parametrize("row", [6, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_passes_on_what_is_not_finite(value: float, row: int, column: int) -> None:
    """To the windows the pixel is in and no further: runs are padded with pixels beside them. An
    odd row is the first of a window, an even one is not."""
    x, weight, bias = image(1, 3, 13, 13), filters(4, 3), torch.randn(4, device=DEVICE)
    x[0, 1, row, column] = value
    y = stem(x, weight, bias)
    want = reference(x, weight, bias)
    require_close(y, want, math_mode_of(x.dtype), 147)
    assert bool((want.isnan() | want.isinf()).any()) and bool(want.isfinite().any())


def test_pads_the_pool_with_less_than_any_value() -> None:
    """Where every product is negative and no bias lifts it, the answer is ReLU's 0; padding of the
    pool may not show either where the bias does."""
    x, weight = image(1, 3, 6, 6).abs(), -filters(4, 3).abs()
    assert not stem(x, weight).any()
    bias = torch.full((4,), 100.0, device=DEVICE)
    require_close(stem(x, weight, bias), reference(x, weight, bias), math_mode_of(x.dtype), 147)


@settings(max_examples=12)
@given(
    n=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20),
    k=st.integers(1, 9), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_agrees_on_any_shape(n: int, c: int, h: int, w: int, k: int, dtype: torch.dtype) -> None:
    x, weight = image(n, c, h, w, dtype=dtype), filters(k, c, dtype)
    require_close(stem(x, weight), reference(x, weight), math_mode_of(dtype), 49 * c)


def test_makes_nothing_of_an_empty_batch() -> None:
    assert stem(image(0, 3, 32, 32), filters(16, 3)).shape == (0, 16, 8, 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_packs_rows_of_the_window(channels: int) -> None:
    weight = filters(5, channels)
    packed = pack_weight(weight)
    assert packed.shape == (7, 5, window_width(channels)) and packed.is_contiguous()
    assert not packed[:, :, :channels].any() and not packed[:, :, 8 * channels :].any()
    for r, s in ((0, 0), (3, 5), (6, 6)):
        at = (1 + s) * channels
        assert torch.equal(packed[r, :, at : at + channels], weight[:, :, r, s])


def test_gradients_agree_with_fp64() -> None:
    leaves = {"x": image(2, 3, 9, 11), "weight": filters(5, 3), "bias": torch.randn(5).to(DEVICE)}
    upstream = image(2, 5, 3, 3)
    require_close_gradients(stem, stem_ref, leaves, upstream, math_mode_of(torch.float32), 1000)


def test_is_a_well_behaved_operator() -> None:
    x, weight, bias = image(1, 3, 9, 9), filters(4, 3), torch.randn(4, device=DEVICE)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    torch.library.opcheck(stem_op, (x, weight, bias))


def test_compiles_without_a_graph_break() -> None:
    x, weight = image(1, 3, 9, 14), filters(4, 3)
    got = torch.compile(lambda x: 2 * stem(x, weight), fullgraph=True, backend="aot_eager")(x)
    require_close(got, 2 * reference(x, weight), math_mode_of(x.dtype), 147)


def test_counts_the_convolution_once() -> None:
    with FlopCounterMode(display=False) as counter:
        stem(image(2, 3, 9, 14), filters(4, 3))
    assert counter.get_total_flops() == 2 * 2 * (5 * 7) * 4 * 147
    assert StemProblem(2, 3, 9, 14, 4).flops == counter.get_total_flops()
    resnet = StemProblem(256, 3, 224, 224, 64)
    assert (resnet.p2, resnet.q2) == (56, 56)
    assert resnet.least_bytes == 2 * (256 * (224 * 224 * 3 + 56 * 56 * 64) + 64 * 148)


X, WEIGHT = torch.zeros(1, 3, 9, 9), torch.zeros(6, 3, 7, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "argument x: shape"),
        ({"x": torch.zeros(1, 5, 9, 9)}, "argument x: 5 channels; accepted: 1 to 4"),
        ({"weight": torch.zeros(6, 3, 3, 3)}, r"accepted: \(6, 3, 7, 7\)"),
        ({"weight": WEIGHT.half()}, "argument weight: torch.float16"),
        ({"bias": torch.zeros(3)}, r"argument bias: shape \(3,\); accepted: \(6,\)"),
        ({"x": X.to("meta")}, "argument weight: on cpu; accepted: meta"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stem(**({"x": X, "weight": WEIGHT} | arguments))


def test_refuses_a_dtype_no_kernel_computes_in() -> None:
    with pytest.raises(ValueError, match=r"argument x: dtype torch.float64"):
        stem(image(1, 3, 9, 9).double(), filters(4, 3).double())


@pytest.mark.parametrize(
    ("field", "value"), [("block_m", 48), ("block_n", 8), ("rows", 0), ("num_warps", 3)]
)
def test_configurations_refuse_values(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"argument {field}: {value}; accepted: "):
        replace(SMALL, **{field: value})


RESNET = StemProblem(256, 3, 224, 224, 64)


def test_configurations_refuse_problems() -> None:
    with pytest.raises(ValueError, match="5 channels"):
        SMALL.check(replace(RESNET, c=5))
    with pytest.raises(ValueError, match="images a CTA"):
        SMALL.check(replace(RESNET, h=2**15, w=2**15))
    with pytest.raises(ValueError, match="images a CTA"):
        choose(replace(RESNET, h=2**15, w=2**15), 132)


@pytest.mark.parametrize("mode", MATH_MODES)
def test_candidates_are_valid(mode: str) -> None:
    for problem in (RESNET, replace(RESNET, n=1, h=7, w=7, k=3)):
        found = candidates(replace(problem, math_mode=mode))
        assert found and set(found) <= set(CONFIGS)
        for config in found:
            config.check(replace(problem, math_mode=mode))


def test_choice_follows_the_problem() -> None:
    assert choose(RESNET, 132) == Config(128, 64, 8, 8, 90)
    assert choose(RESNET, 108, (8, 0)) == Config(64, 32, 8, 4)
    assert choose(replace(RESNET, n=8), 132) == Config(128, 64, 1, 8, 90)
    assert choose(replace(RESNET, n=1), 132) == Config(64, 32, 1, 4)
    assert choose(replace(RESNET, math_mode="ieee"), 132) == Config(32, 32, 8, 8)


def test_ships_every_tile() -> None:
    """Strips of different length run the same code."""
    made = [launch for _, launch in shipped()]
    tiles = {(m.constants["BLOCK_M"], m.constants["BLOCK_N"], m.num_warps) for m in made}
    assert tiles == {(c.block_m, c.block_n, c.num_warps) for c in CONFIGS}
    assert {m.constants["MATH_MODE"] for m in made} == set(MATH_MODES)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("mode", MATH_MODES)
def test_every_configuration_is_right_at_full_size(mode: str) -> None:
    dtype = MATH_MODES[mode][0]
    arch = 10 * torch.cuda.get_device_capability()[0]
    x, weight = image(4, 3, 224, 224, dtype=dtype), filters(64, 3, dtype)
    bias = torch.randn(64, device=DEVICE)
    want = reference(x, weight, bias)
    for config in candidates(StemProblem(4, 3, 224, 224, 64, mode)):
        if config.least_capability <= arch:
            y = poisoned(4, 64, 56, 56, dtype=dtype)
            launch(y, x, pack_weight(weight), bias, math_mode=mode, config=config).run()
            require_close(y, want, mode, 147)
