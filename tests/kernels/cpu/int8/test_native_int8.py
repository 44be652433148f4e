"""Native convolutions on uint8 against their integer twin, bit by bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int8_steps import Int8Conv, of_int8, random_conv, random_values
from native_problems import FORMS, PROBLEMS, config_of, every_config, problem_of
from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.program import ACTIVATIONS, lanes
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.ops.quantization import Quantization, dequantize, quantize_weights

pytestmark = pytest.mark.slow

INT8_FORMS = {name: form for name, form in FORMS.items() if form[0] != "winograd"}


def require_every_way(conv: Int8Conv) -> None:
    want = conv.expected()
    tried = every_config(conv.problem)
    assert tried, "nothing was tried"
    for config in tried:
        for threads in (1, 2):
            assert torch.equal(conv.run(config, threads), want), config


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("residual", ["none", "before"])
def test_every_way_to_compute_a_convolution_gives_the_twins_bits(name: str, residual: str) -> None:
    epilogue = PROBLEMS[name].epilogue._replace(residual=residual)  # type: ignore[arg-type]
    require_every_way(random_conv(replace(PROBLEMS[name], n=3, epilogue=epilogue)))


@pytest.mark.parametrize("channels", [1, 3, 5, 17, 64, 130])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((1, 1), 1), ((3, 3), 1), ((5, 5), 1), ((7, 7), 2)], ids=str
)
def test_channels_that_fill_no_unit(channels: int, kernel: tuple[int, int], stride: int) -> None:
    """The last pixel's last channel is the last byte of a page: behind it nothing may be read."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    for n in (1, 3):
        problem = problem_of(
            n, channels, 9, 7, 19, *kernel, stride=(stride, stride), padding=padding
        )
        require_every_way(random_conv(problem, seed=channels))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", INT8_FORMS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_every_activation_with_and_without_a_residual(
    activation: str, name: str, residual: str
) -> None:
    form, problem = FORMS[name]
    epilogue = problem.epilogue._replace(activation=activation, residual=residual)  # type: ignore[arg-type]
    problem = replace(problem, n=2, epilogue=epilogue)
    conv = random_conv(problem, output_zero=100)
    conv.require_right(config_of(form, problem))
    if residual != "none":
        conv.require_right(config_of(form, problem), in_place=True)
    else:
        as_float = random_conv(of_int8(problem, "int8_fp32"))
        got = as_float.require_right(config_of(form, problem))
        assert got.dtype == torch.float32


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
@pytest.mark.parametrize("name", [*INT8_FORMS, "dilation", "windows of nothing but padding"])
def test_zero_points_and_scales(zero_point: int, name: str) -> None:
    """Windows at an edge read zero points, whichever they are."""
    problem = FORMS[name][1] if name in FORMS else PROBLEMS[name]
    problem = replace(problem, n=2)
    for scale in (1e-6, 0.3, 4096.0):
        for output_zero in (0, 200):
            conv = random_conv(problem, zero_point=zero_point, scale=scale, output_zero=output_zero)
            require_every_way(conv)


@pytest.mark.parametrize("name", INT8_FORMS)
def test_outputs_are_clipped_at_both_ends(name: str) -> None:
    problem = FORMS[name][1]
    problem = replace(problem, epilogue=problem.epilogue._replace(activation="identity"))
    conv = random_conv(problem, output_zero=128, clipped=0.3)
    got = conv.require_right(config_of(FORMS[name][0], conv.problem))
    assert int((got == 0).sum()) > 20 and int((got == 255).sum()) > 20
    huge = replace(conv, stored=Quantization(1e30, 3), output=Quantization(1e-7, 128))
    got = huge.require_right(config_of(FORMS[name][0], conv.problem))
    assert set(got.unique().tolist()) <= {0, 128, 255}  # beyond an int32, and beyond a float32


@pytest.mark.parametrize("signs", ["positive", "negative", "in turns"])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_the_largest_sums_are_exact(signs: str, zero_point: int) -> None:
    """4,608 products of 255 and 127: an instruction that adds two of them in 16 bits saturates."""
    problem = of_int8(problem_of(1, 512, 3, 3, lanes(), 3, 3, "identity"), "int8_fp32")
    weight = torch.full(problem.weight_shape, 127.0, dtype=torch.float64)
    if signs != "positive":
        weight[:, :: 2 if signs == "in turns" else 1] *= -1
    x = torch.full(problem.input_shape, 255 - zero_point, dtype=torch.uint8)
    stored = Quantization(1.0, zero_point)
    conv = Int8Conv(problem, x, weight, torch.zeros(problem.k), stored)
    for config in every_config(conv.problem):
        got = conv.require_right(config)
        sign = {"positive": 1, "negative": -1, "in turns": 0}[signs]
        difference = 255 - 2 * zero_point
        want = torch.tensor(float(sign * difference * 127 * 4608), dtype=torch.float64).float()
        assert torch.equal(got, want.expand(got.shape))


@pytest.mark.parametrize("by_channel", [False, True])
def test_blocks_smaller_than_the_map(by_channel: bool) -> None:
    conv = random_conv(problem_of(2, 530, 5, 7, 150, 3, 3, padding=(1, 1), residual=True))
    want = conv.expected()
    for block in (6, 12, 30):
        for threads in (1, 3):
            got = conv.run(NativeConfig("direct", by_channel, block), threads)
            assert torch.equal(got, want)


@settings(max_examples=60)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9),
        st.integers(1, 70), st.integers(1, 5), st.integers(1, 5),
    ),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.sampled_from(["none", "before", "after"]),
    zero_points=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    exponent=st.integers(-20, 10),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_convolution(
    sizes: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], activation: str, residual: str, zero_points: tuple[int, int],
    exponent: int, seed: int,
) -> None:  # fmt: skip
    problem = problem_of(*sizes, activation, stride=stride, padding=padding, dilation=dilation)
    problem = replace(problem, epilogue=problem.epilogue._replace(residual=residual))  # type: ignore[arg-type]
    if min(problem.p, problem.q) < 1:
        return
    conv = random_conv(
        problem, seed, zero_points[0], scale=2.0**exponent, output_zero=zero_points[1]
    )
    for config in every_config(conv.problem)[:2]:
        conv.require_right(config, threads=1 + seed % 2)


def test_the_twin_is_close_to_the_convolution_of_real_numbers() -> None:
    """Quantisation is all that lies between: half a step of the output and of each weight."""
    conv = random_conv(problem_of(2, 24, 7, 6, 40, 3, 3, "identity", padding=(1, 1)))
    assert conv.output is not None
    weight, scale = quantize_weights(conv.weight)
    real = torch.nn.functional.conv2d(
        (conv.x.double() - conv.stored.zero_point) * conv.stored.scale,
        weight.double() * scale.view(-1, 1, 1, 1), conv.bias.double(), padding=1,
    )  # fmt: skip
    got = dequantize(conv.run(config_of("direct", conv.problem)), conv.output).double()
    clipped = real.clamp(conv.output.least, conv.output.largest)
    assert float((got - clipped).abs().max()) < 0.5001 * conv.output.scale


# What is refused


def test_what_int8_refuses_and_why() -> None:
    def reason(problem: ConvProblem, to: str = "int8") -> str | None:
        return conv_candidates.refusal(of_int8(problem, to))

    three = problem_of(1, 64, 9, 9, 64, 3, 3, padding=(1, 1))
    assert reason(three) is None and list(conv_candidates.forms(of_int8(three))) == ["direct"]
    assert "float32" in str(reason(replace(three, epilogue=three.epilogue._replace(
        residual="before")), "int8_fp32"))  # fmt: skip
    assert "an int32 takes 65793" in str(reason(problem_of(1, 3000, 9, 9, 64, 5, 5)))
    wide = problem_of(1, 64, 9, 9, 64, 9, 9, padding=(4, 4), groups=16)  # 324 products
    assert reason(wide) is None
    wider = problem_of(1, 64, 11, 11, 64, 9, 9, padding=(4, 4), groups=8)  # 648
    assert "grouped" in conv_candidates.forms(wider)
    assert "grouped" not in conv_candidates.forms(of_int8(wider))
    if lanes() > 8:
        assert "a float32 takes 514" in str(reason(wider))
    else:
        require_every_way(random_conv(wider))
    require_every_way(random_conv(wide))


def test_the_deepest_group_is_exact() -> None:
    """8 channels by 8x8 taps: the largest sum is just below 2^24, which float32 counts to."""
    problem = problem_of(1, 64, 8, 8, 64, 8, 8, "identity", groups=8)
    conv = random_conv(of_int8(problem, "int8_fp32"), zero_point=0)
    ones = torch.ones(problem.weight_shape, dtype=torch.float64)
    x = torch.full(problem.input_shape, 255, dtype=torch.uint8)
    x[0, :, 0, 0] = 254
    conv = replace(conv, x=x, weight=ones, stored=Quantization(1.0, 0), bias=torch.zeros(64))
    for config in every_config(conv.problem):
        conv.require_right(config)


def test_weights_are_rounded_half_to_even_and_never_to_minus_128() -> None:
    weight = torch.tensor([[-127.0, 126.5, 0.5, 1.5], [0, 0, 0, 0]], dtype=torch.float64)
    values, scale = quantize_weights(weight.view(2, 4, 1, 1))
    assert values.flatten(1).tolist() == [[-127, 126, 0, 2], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weights(torch.full((1, 1, 1, 1), float("nan")))


def test_the_twin_pads_with_zero_points() -> None:
    x = random_values((1, 3, 4, 4))
    conv = random_conv(problem_of(1, 3, 4, 4, 5, 3, 3, "identity", padding=(1, 1)))
    framed = torch.nn.functional.pad(x, (1, 1, 1, 1), value=conv.stored.zero_point)
    same = replace(conv, x=x).expected()
    inner = replace(conv.problem, h=6, w=6, geometry=conv.problem.geometry._replace(padding=(0, 0)))
    assert torch.equal(replace(conv, x=framed, problem=inner).expected(), same)
