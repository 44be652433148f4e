"""The block tail against fp64: 3x3, 1x1 + residual, and the next block's 1x1.

Channels are not tiny, because the kernel takes 64, 128 or 256; images are.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import exact, require_close
from kernel_inputs import DEVICE, NEEDS_GPU
from resfuse.kernels.gpu.block_tail import block_tail as module
from resfuse.kernels.gpu.block_tail.block_tail import block_tail, block_tail_ref, problem_of
from resfuse.kernels.gpu.block_tail.block_tail_config import (
    CONFIGS,
    ROW,
    TILES,
    Config,
    TailProblem,
    candidates,
    choose,
    supports,
)
from resfuse.kernels.gpu.block_tail.block_tail_kernel import launch, shipped
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.ops.conv_problem import MATH_MODES

pytestmark = pytest.mark.slow

SMALL = TailProblem(1, 64, 5, 7, 64, 64, 1, "ieee")  # 35 pixels: neither a tile nor a multiple
Arguments = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 means ieee here, on a GPU too; tf32 is asked for by name."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def arguments(problem: TailProblem, seed: int = 0) -> Arguments:
    """Random tensors by parameter name; weights keep the variance of what they multiply."""
    g = torch.Generator().manual_seed(seed)
    n, c, k, d = problem.n, problem.c, problem.k, problem.d

    def make(*shape: int, fan_in: int = 1) -> Tensor:
        values = torch.randn(shape, generator=g) / fan_in**0.5
        return values.to(DEVICE, MATH_MODES[problem.math_mode][0])

    return {
        "x": channels_last(make(n, c, problem.h, problem.w)),
        "weight2": make(c, c, 3, 3, fan_in=9 * c),
        "bias2": make(c),
        "weight3": make(k, c, 1, 1, fan_in=c),
        "bias3": make(k),
        "residual": channels_last(make(n, k, problem.p, problem.q)),
        "next_weight": make(d, k, 1, 1, fan_in=k) if d else None,
        "next_bias": make(d) if d else None,
    }


def as_pair(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def reference(given: Arguments, stride: int = 1) -> tuple[Tensor, ...]:
    """The twin in fp64."""
    return as_pair(exact(block_tail_ref, **given, stride=(stride, stride)))


def require_right(got: tuple[Tensor, ...], given: Arguments, problem: TailProblem) -> None:
    want = reference(given, problem.stride)
    assert len(got) == len(want)
    for made, wanted in zip(got, want, strict=True):
        assert made.is_contiguous(memory_format=torch.channels_last)
        require_close(made, wanted, problem.math_mode, 9 * problem.c)


@pytest.mark.parametrize(
    "problem",
    [
        TailProblem(2, 64, 8, 8, 256, 64),  # ResNet-50's stage 1, cut small
        TailProblem(1, 64, 5, 7, 64),  # primes, without the chain
        TailProblem(1, 64, 1, 1, 64, 128),  # one pixel: eight of nine taps are padding
        TailProblem(3, 64, 3, 5, 128, 64),  # an odd batch; tiles cross images
        TailProblem(2, 64, 7, 6, 64, 0, 2),  # stride 2, odd and even
        TailProblem(1, 64, 6, 9, 64, 64, 2),
        TailProblem(1, 128, 3, 3, 128, 256),
        TailProblem(1, 256, 2, 3, 128, 256),
    ],
    ids=TailProblem.label,
)
@pytest.mark.parametrize("math_mode", ["ieee", "fp16", "bf16"])
def test_the_op_is_right(problem: TailProblem, math_mode: str) -> None:
    problem = dataclasses.replace(problem, math_mode=math_mode)
    given = arguments(problem)
    got = block_tail(**given, stride=(problem.stride, problem.stride))
    require_right(as_pair(got), given, problem)


def shipped_cases() -> Iterator[tuple[str, int, int, Config]]:
    for math_mode, table in TILES.items():
        for (c, d), configs in table.items():
            for config in configs:
                yield math_mode, c, d, config


@pytest.mark.parametrize(("math_mode", "c", "d", "config"), list(shipped_cases()))
def test_every_shipped_config_writes_every_element(
    math_mode: str, c: int, d: int, config: Config
) -> None:
    """Launched into NaN, so that an element that is left out shows."""
    problem = TailProblem(1, c, 3, 5, 128, d, 1, math_mode)
    given = arguments(problem)
    check_launch(problem, config, given)


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("d", [0, 64])
def test_ctas_that_stay_go_through_all_tiles(d: int, kept: int) -> None:
    """Two of them through seven tiles, the last of which is not full."""
    problem = TailProblem(3, 64, 11, 13, 64, d, 1, "fp16")
    assert problem.pixels % 64 and -(-problem.pixels // 64) == 7
    check_launch(problem, Config(64, 64, 64, 4, 1, kept=kept), arguments(problem), ctas=2)


def test_ctas_that_stay_are_as_many_as_there_is_room_for() -> None:
    stage1 = TailProblem(256, 64, 56, 56, 256)
    narrow, wide = Config(64, 64, 64, 4, 1, kept=3), Config(128, 64, 64, 8, 1, kept=3)
    assert (narrow.ctas(stage1, 132), wide.ctas(stage1, 132)) == (264, 132)
    assert narrow.ctas(dataclasses.replace(stage1, n=1), 132) == 49  # one a tile
    assert Config(64, 64, 64, 4, 2).ctas(stage1, 132) == 256 * 49


def check_launch(
    problem: TailProblem, config: Config, given: Arguments, ctas: int | None = None
) -> None:
    x = given["x"]
    assert x is not None
    shapes = [(problem.n, channels, problem.p, problem.q) for channels in (problem.k, problem.d)]
    y, y_next = (channels_last(x.new_full(shape, float("nan"))) for shape in shapes)
    ready = {
        name: channels_last(t) if t is not None and t.dim() == 4 else t for name, t in given.items()
    }
    built = launch(problem, config, **ready, y=y, y_next=y_next if problem.d else None)
    if ctas is not None:
        built = dataclasses.replace(built, grid=(ctas,))
    built.run()
    require_right((y, y_next) if problem.d else (y,), given, problem)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(("math_mode", "c", "d", "config"), list(shipped_cases()))
def test_every_shipped_config_on_its_real_problem(
    math_mode: str, c: int, d: int, config: Config
) -> None:
    size = 56 * 64 // c
    for stride in (1, 2):
        problem = TailProblem(8, c, stride * size, stride * size, 4 * c, d, stride, math_mode)
        check_launch(problem, config, arguments(problem))


@settings(max_examples=8)
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    d=st.sampled_from([0, 64]),
    stride=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_any_size(n: int, h: int, w: int, d: int, stride: int, seed: int) -> None:
    problem = TailProblem(n, 64, h, w, 64, d, stride, "ieee")
    given = arguments(problem, seed)
    require_right(as_pair(block_tail(**given, stride=(stride, stride))), given, problem)


def test_memory_formats_do_not_matter() -> None:
    """NCHW, and every other element of something larger."""
    given = arguments(SMALL)
    want = as_pair(block_tail(**given))
    nchw = {name: None if t is None else t.contiguous() for name, t in given.items()}
    sparse = {
        name: None if t is None else torch.stack([t, t + 1], dim=-1)[..., 0]
        for name, t in given.items()
    }
    for other in (nchw, sparse):
        for got, wanted in zip(as_pair(block_tail(**other)), want, strict=True):
            assert torch.equal(got, wanted)
            assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_that_is_not_aligned() -> None:
    given = arguments(SMALL)
    x = given["x"]
    assert x is not None
    n, c, h, w = x.shape
    memory = torch.zeros(x.numel() + 1, device=DEVICE)
    shifted = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16 != 0
    require_right(as_pair(block_tail(**{**given, "x": shifted})), given, SMALL)


@pytest.mark.parametrize("math_mode", ["ieee", "fp16"])
def test_nan_and_infinity_pass_through_as_in_torch(math_mode: str) -> None:
    problem = dataclasses.replace(SMALL, math_mode=math_mode)
    given = arguments(problem)
    x, residual = given["x"], given["residual"]
    assert x is not None
    assert residual is not None
    x[0, 3, 0, 0] = float("nan")
    residual[0, 5, 4, 6] = float("inf")
    residual[0, 6, 4, 5] = float("-inf")  # relu makes 0 of it
    residual[0, 7, 4, 4] = float("nan")
    want = reference(given)
    assert want[0].isnan().sum() == 4 * problem.k + 1  # the corner's four pixels see the NaN
    require_right(as_pair(block_tail(**given)), given, problem)


def test_biases_may_be_fp32() -> None:
    problem = dataclasses.replace(SMALL, math_mode="fp16")
    given = arguments(problem)
    for name in ("bias2", "bias3", "next_bias"):
        bias = given[name]
        assert bias is not None
        given[name] = bias.float() + 2**-14  # what fp16 would round away
    require_right(as_pair(block_tail(**given)), given, problem)


def test_the_twin_answers_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(SMALL)
    monkeypatch.setattr(module, "runs_triton", lambda _: False)
    monkeypatch.setattr(module, "launch", lambda *_: pytest.fail("the kernel was launched"))
    require_right(as_pair(block_tail(**given)), given, SMALL)


@pytest.mark.parametrize("d", [0, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients(d: int, stride: int) -> None:
    problem = dataclasses.replace(SMALL, d=d, stride=stride)
    given = {name: t for name, t in arguments(problem).items() if t is not None}
    ours = {name: t.clone().requires_grad_() for name, t in given.items()}
    wide = {name: t.double().requires_grad_() for name, t in given.items()}
    strides = (stride, stride)
    got, want = block_tail(**ours, stride=strides), block_tail_ref(**wide, stride=strides)
    seeds = [torch.randn_like(t) for t in as_pair(got)]
    torch.autograd.backward(as_pair(got), seeds)
    torch.autograd.backward(as_pair(want), [seed.double() for seed in seeds])
    for name, tensor in wide.items():
        assert tensor.grad is not None
        # sums over all pixels of sums over channels
        require_close(ours[name].grad, tensor.grad, "ieee", 9 * 64 * problem.pixels)


def test_gradients_of_one_output_and_one_input() -> None:
    """The other output's gradient is missing, the other inputs' is not wanted."""
    given = arguments(SMALL)
    x = given["x"]
    assert x is not None
    for index in (0, 1):
        ours, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        as_pair(block_tail(**{**given, "x": ours}))[index].sum().backward()
        others = {name: None if t is None else t.double() for name, t in given.items()}
        as_pair(block_tail_ref(**{**others, "x": wide}))[index].sum().backward()
        assert wide.grad is not None
        require_close(ours.grad, wide.grad, "ieee", 9 * 64 * SMALL.k)


@pytest.mark.parametrize("d", [0, 64])
def test_the_op_keeps_torch_s_rules(d: int) -> None:
    """Schema, fake tensors, autograd registration, and AOT dispatch."""
    problem = dataclasses.replace(SMALL, d=d, stride=2)
    given = [t.requires_grad_() for t in arguments(problem).values() if t is not None]
    op = torch.ops.resfuse.block_tail_next if d else torch.ops.resfuse.block_tail
    torch.library.opcheck(op.default, (*given[:6], 2, *given[6:]))


def test_it_compiles_into_one_graph() -> None:
    given = arguments(SMALL)

    def twice(given: Arguments) -> Tensor:
        y, y_next = block_tail(**given)
        return y.mean() + 2 * y_next.mean()

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), twice(given))


def test_flops_are_counted() -> None:
    for d, stride in ((0, 1), (128, 2)):
        problem = dataclasses.replace(SMALL, d=d, stride=stride)
        given, strides = arguments(problem), (stride, stride)
        with FlopCounterMode(display=False) as fused:
            block_tail(**given, stride=strides)
        with FlopCounterMode(display=False) as plain:
            block_tail_ref(**given, stride=strides)
        assert fused.get_total_flops() == plain.get_total_flops() == problem.flops


def changed(name: str, value: object) -> dict[str, object]:
    return {**arguments(SMALL), name: value}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", torch.zeros(64, 5, 7), "argument x: shape (64, 5, 7); accepted: 4 dimensions"),
        ("x", torch.zeros(1, 64, 5, 7).double(), "argument x: dtype torch.float64"),
        ("weight2", torch.zeros(64, 2, 3, 3), "argument weight2: shape (64, 2, 3, 3); accepted"),
        ("weight2", torch.zeros(64, 64, 3, 3).half(), "argument weight2: torch.float16; accepted"),
        ("bias3", torch.zeros(63), "argument bias3: shape (63,); accepted: (64,)"),
        ("residual", torch.zeros(1, 64, 5, 6), "argument residual: shape (1, 64, 5, 6); accepted"),
        ("next_weight", torch.zeros(64, 32, 1, 1), "argument next_weight: shape (64, 32, 1, 1)"),
        ("next_bias", None, "argument next_bias: "),
        ("stride", (3, 3), "argument stride: (3, 3); accepted: (1, 1), (2, 2)"),
        ("stride", (1, 2), "argument stride: (1, 2); accepted: (1, 1), (2, 2)"),
    ],
)
def test_what_is_refused(name: str, value: object, said: str) -> None:
    if isinstance(value, Tensor):
        value = value.to(DEVICE)
    with pytest.raises(ValueError) as error:
        block_tail(**changed(name, value))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("c", "k", "d"), [(512, 2048, 0), (96, 384, 0), (64, 65, 0), (64, 64, 192)]
)
def test_channels_that_do_not_fit_are_refused(c: int, k: int, d: int) -> None:
    problem = TailProblem(1, c, 1, 1, k, d, 1, "ieee")
    given = arguments(problem)
    weight3, x = given["weight3"], given["x"]
    assert x is not None
    assert weight3 is not None
    assert not supports(problem_of(x, weight3, given["next_weight"], 1))
    with pytest.raises(ValueError, match=f"argument problem: 1x{c}x1x1 k{k}"):
        block_tail(**given)


def test_configs_refuse_what_would_be_wrong() -> None:
    for bad, said in (
        ({"block_m": 48}, "argument block_m: 48; accepted: powers of two from 16"),
        ({"block_n": 8}, "argument block_n: 8"),
        ({"num_warps": 3}, "argument num_warps: 3; accepted: 1, 2, 4, 8"),
        ({"num_stages": 0}, "argument num_stages: 0"),
        ({"taps": 2}, "argument taps: 2; accepted: 1, 3, 9"),
        ({"kept": 2}, "argument kept: 2; accepted: 0, 1, 3"),
    ):
        with pytest.raises(ValueError) as error:
            dataclasses.replace(Config(64, 64, 64, 4, 2), **bad)
        assert said in str(error.value)
    for problem, said in (
        (TailProblem(1, 96, 4, 4, 64), "argument c: 96"),
        (TailProblem(1, 512, 4, 4, 64), "argument c: 512"),
        (TailProblem(1, 64, 4, 4, 96), "argument k: 96; accepted: multiples of 64"),
        (TailProblem(1, 64, 4, 4, 64, 96), "argument d: 96"),
        (TailProblem(1, 64, 4, 4, 64, 0, 3), "argument stride: 3"),
    ):
        with pytest.raises(ValueError) as error:
            Config(64, 64, 64, 4, 2).check(problem)
        assert said in str(error.value)
    with pytest.raises(ValueError, match="argument c: 128; accepted: 64 where weights are kept"):
        Config(64, 64, 64, 4, 1, kept=1).check(TailProblem(1, 128, 4, 4, 64))
    with pytest.raises(ValueError, match="argument c: 64; accepted: multiples of 128"):
        Config(64, 64, 128, 4, 2).check(TailProblem(1, 64, 4, 4, 64))


def test_candidates_and_choice() -> None:
    stage1 = TailProblem(256, 64, 56, 56, 256, 64)
    assert choose(stage1, 132) == candidates(stage1)[0] == Config(64, 64, 64, 4, 3, taps=ROW)
    # 3136 pixels: 49 tiles of 64, too few for a GPU of 132; then the smallest tile
    assert choose(dataclasses.replace(stage1, n=1), 132).block_m == 64
    assert all(choose(stage1, sms).is_proven for sms in (1, 132, 1 << 20))
    assert not all(config.is_proven for config in candidates(stage1))
    assert all(set(candidates(problem)) <= set(CONFIGS) for problem in (stage1, SMALL))
    for unsupported in (
        dataclasses.replace(stage1, c=512),
        dataclasses.replace(stage1, d=256),
        dataclasses.replace(stage1, k=96),
        dataclasses.replace(stage1, stride=4),
    ):
        assert candidates(unsupported) == []
        assert not supports(unsupported)


def test_what_a_problem_costs() -> None:
    """Stage 1 of ResNet-50, one image: 56 * 56 pixels, and the megabytes the docstring quotes."""
    problem = TailProblem(1, 64, 56, 56, 256, 64)
    assert problem.flops == 2 * 3136 * (9 * 64 * 64 + 2 * 64 * 256)
    weights = 9 * 64 * 64 + 2 * 64 * 256 + 64 + 256 + 64
    assert problem.least_bytes == 2 * (3136 * (64 + 256 + 256 + 64) + weights)
    assert (TailProblem(1, 64, 7, 8, 64, 0, 2).p, TailProblem(1, 64, 7, 8, 64, 0, 2).q) == (4, 4)


def test_every_config_is_shipped_for_inspection() -> None:
    labels = [label for label, _ in shipped()]
    assert len(set(labels)) == len(labels)
    for math_mode, _, _, config in shipped_cases():
        assert any(label.endswith(f"{math_mode}: {config.label()}") for label in labels)
