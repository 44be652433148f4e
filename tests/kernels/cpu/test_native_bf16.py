"""Native steps on bfloat16: float32 arithmetic, and one rounding where a value is stored."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from test_native_chain import SHAPES, bottleneck, in_small_blocks, whole
from test_native_strips import BOTTLENECKS, STEMS, in_strips, stem
from test_native_strips import bottleneck as read_in_windows
from torch import Tensor

from bf16_graphs import (
    bf16_inputs,
    conv_exactly,
    in_bf16,
    of_bf16,
    require_conv_rounded_once,
    require_rounded_once,
    run,
)
from graphs import (
    affine_graph,
    conv_graph,
    conv_state,
    norm_named,
    norm_state,
    one_node,
    pool_graph,
)
from guarded_memory import guarded
from native_problems import FORMS, POOLS, PROBLEMS, config_of, every_config, problem_of
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.library import bf16_isa, library, processor
from resfuse.kernels.cpu.program import ACTIVATIONS, lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Graph,
    MaxPool,
    Mean,
    Node,
    Pick,
    State,
    Value,
)
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native, native_rows

pytestmark = pytest.mark.slow


def single(config: NativeConfig) -> Candidate:
    return Candidate("native", 0, 1, tuple(asdict(config).items()))


# Convolutions


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("residual", ["none", "before"])
def test_every_way_to_compute_a_convolution_rounds_once(name: str, residual: str) -> None:
    epilogue = PROBLEMS[name].epilogue._replace(residual=residual)  # type: ignore[arg-type]
    problem = of_bf16(replace(PROBLEMS[name], n=2, epilogue=epilogue))
    tried = every_config(problem)
    assert tried, "nothing was tried"
    for config in tried:
        require_conv_rounded_once(problem, config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_every_activation_with_and_without_a_residual(
    activation: str, name: str, residual: str
) -> None:
    form, problem = FORMS[name]
    epilogue = problem.epilogue._replace(activation=activation, residual=residual)  # type: ignore[arg-type]
    problem = of_bf16(replace(problem, n=2, epilogue=epilogue))
    require_conv_rounded_once(problem, config_of(form, problem))


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("form", ["direct", "winograd"])
def test_blocks_smaller_than_the_map(form: str, by_channel: bool) -> None:
    problem = of_bf16(problem_of(2, 144, 5, 7, 144, 3, 3, padding=(1, 1), residual=True))
    for block in (6, 12, 30):
        require_conv_rounded_once(problem, NativeConfig(form, by_channel, block))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*FORMS, "no whole vectors", "just under a vector"])
def test_steps_write_into_their_own_memory_alone(name: str) -> None:
    problem = of_bf16(FORMS[name][1] if name in FORMS else PROBLEMS[name])
    problem = replace(problem, n=2, epilogue=problem.epilogue._replace(residual="before"))
    graph, state = in_bf16(conv_graph(problem)), conv_state(problem)
    inputs = bf16_inputs(graph)
    for config in every_config(problem):
        with guarded() as guards:
            got = run(graph, single(config), state, inputs)
            require_rounded_once(got, conv_exactly(graph, state, inputs, config.form), 2e-5)
            guards.require_intact()


def awkward(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0, 1, 1], x[0, 0, 6, 6], x[0, 0, 11, 2] = float("nan"), float("inf"), -float("inf")
    return x


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["CIFAR's stem", "no whole vectors", "depthwise"])
def test_nan_and_infinity_come_out_as_torch_has_them(name: str, activation: str) -> None:
    """In one channel of some pixels: a pair's other half, and the pixel behind an odd number of
    channels, have none of them."""
    epilogue = PROBLEMS[name].epilogue._replace(activation=activation)
    problem = of_bf16(replace(PROBLEMS[name], h=13, w=13, epilogue=epilogue))
    graph, state = in_bf16(conv_graph(problem)), conv_state(problem)
    inputs = [awkward(bf16_inputs(graph)[0])]
    form = "grouped" if problem.groups > 1 else "direct"
    got = run(graph, single(config_of(form, problem)), state, inputs)
    want = conv_exactly(graph, state, inputs, form)
    assert want.isnan().any() and want.isfinite().any()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[want.isinf()].double(), want[want.isinf()])
    finite = want.isfinite()
    require_rounded_once(got[finite], want[finite], 2e-5)


# Fused runs


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_answers_as_its_convolutions_one_by_one(shape: str) -> None:
    graph, state = bottleneck(**SHAPES[shape], projection=True, following=True)  # type: ignore[arg-type]
    graph = in_bf16(graph)
    choices = whole(graph)
    assert choices
    for choice in choices:
        small = choice.settings["form"] == "direct"
        for one in (choice, *([in_small_blocks(choice)] if small else [])):
            require_as_one_by_one(graph, state, one, choice.settings["form"])


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", [*STEMS, *BOTTLENECKS])
def test_strips_answer_as_what_they_fuse_one_by_one(name: str) -> None:
    graph, state = stem(*STEMS[name]) if name in STEMS else read_in_windows(*BOTTLENECKS[name])
    graph = in_bf16(graph)
    offered = [c for c in native_rows.segments(graph, 0) if c.stop == len(graph.nodes)]
    assert offered
    for choice in offered:
        for one in (choice, in_strips(choice, 2)):
            require_as_one_by_one(graph, state, one, choice.settings["form"])


def require_as_one_by_one(graph: Graph, state: State, choice: Candidate, first: str) -> None:
    """Bit for bit: blocks divide pixels, and never a sum."""
    inputs = bf16_inputs(graph)
    choices = []
    for at in range(len(graph.nodes)):
        offered = list(native.segments(graph, at))
        forms = [c for c in offered if c.settings.get("form") == (first if at == 0 else "direct")]
        grouped = [c for c in offered if c.settings.get("form") == "grouped"]
        choices.append([*(grouped if at else []), *forms, *offered][0])
    want = [y.clone() for y in Executor(graph, choices, state)(*inputs)]
    with guarded() as guards:
        got = Executor(graph, [choice], state)(*inputs)
        assert all(map(torch.equal, got, want))
        guards.require_intact()


# Pools, norms, gates, picks, concatenations


def require_map(graph: Graph, state: State | None = None, slack: float = 2e-6) -> None:
    graph, state = in_bf16(graph), state or {}
    inputs = bf16_inputs(graph)
    (choice,) = native.segments(graph, 0)
    with guarded() as guards:
        got = run(graph, choice, state, inputs)
        require_rounded_once(got, eager.exact(graph, state, inputs)[0], slack)
        guards.require_intact()


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", POOLS)
def test_max_pools(name: str) -> None:
    require_map(pool_graph(*POOLS[name]), slack=0)


def test_a_max_pool_keeps_nan() -> None:
    graph = in_bf16(pool_graph(MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (1, 32, 13, 13)))
    inputs = [awkward(bf16_inputs(graph)[0])]
    got = run(graph, Candidate("native", 0, 1), {}, inputs)
    want = torch.max_pool2d(inputs[0].float(), 3, 2, 1)
    assert want.isnan().any()
    assert torch.equal(got.float().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("shape", [(3, 10, 13, 5), (2, 16, 1, 1), (1, 2048, 2, 2)])
def test_means_and_average_pools(shape: tuple[int, ...]) -> None:
    require_map(pool_graph(Mean(), shape))
    op = AveragePool((3, 3), (2, 2), (1, 1))
    pooled = torch.nn.functional.avg_pool2d(torch.zeros(shape), 3, 2, 1).shape
    require_map(one_node(op, {"x": shape, "y": tuple(pooled)}, ("x",)))


def test_picked_pixels_with_zeros_behind() -> None:
    op = Pick((0, 2, 2, 4), (1, 0, 5), 30)
    require_map(one_node(op, {"x": (2, 70, 5, 6), "y": (2, 100, 4, 3)}, ("x",)), slack=0)
    op = replace(op, around=(1, 0, 2, 3))
    require_map(one_node(op, {"x": (2, 70, 5, 6), "y": (2, 100, 9, 4)}, ("x",)), slack=0)


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
@pytest.mark.parametrize("shape", [(3, 70, 5, 3), (3, 70)])
def test_batch_norms_and_gates(activation: str, residual: str, shape: tuple[int, ...]) -> None:
    slope = {"prelu": "slope", "leaky_relu": 0.1}.get(activation)
    how = (activation, slope, residual != "none", residual == "after")
    state = norm_state("norm", 70, torch.Generator().manual_seed(0))
    state["slope"] = torch.randn(70, generator=torch.Generator().manual_seed(0))
    require_map(affine_graph(Affine(norm_named("norm"), *how), shape), state)
    if len(shape) == 4:
        names = ("x", "g", "r") if residual != "none" else ("x", "g")
        shapes = {"x": shape, "y": shape, "g": (3, 70, 1, 1)}
        require_map(one_node(Affine(None, *how, gate=True), shapes, names), state)


@pytest.mark.parametrize("channels", [(16, 48), (32, 64, 16)])
def test_a_concatenation_is_copied_where_it_is_not_written_in_place(
    channels: tuple[int, ...],
) -> None:
    names = tuple(f"x{i}" for i in range(len(channels)))
    shapes = {name: (2, c, 3, 5) for name, c in zip(names, channels, strict=True)}
    graph = one_node(Concat(), {**shapes, "y": (2, sum(channels), 3, 5)}, names)
    require_map(replace(graph, input="x0"), slack=0)


# Conversions


def convert_graph(to: torch.dtype, shape: tuple[int, ...]) -> Graph:
    of = torch.float32 if to == torch.bfloat16 else torch.bfloat16
    node = Node("y", Convert(str(to).removeprefix("torch.")), ("x",))
    return Graph("x", ("y",), (node,), {"x": Value(shape, of), "y": Value(shape, to)})


def test_every_bfloat16_converts_to_float32_and_back() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every.view(1, 64, 32, 32)
    one = Candidate("native", 0, 1)
    wide = run(convert_graph(torch.float32, tuple(every.shape)), one, {}, [every])
    assert torch.equal(wide.isnan(), every.isnan())
    assert torch.equal(wide.nan_to_num(7.0), every.float().nan_to_num(7.0))
    back = run(convert_graph(torch.bfloat16, tuple(every.shape)), one, {}, [wide])
    normal = every.float().abs() >= torch.finfo(torch.bfloat16).tiny
    normal |= (every == 0) | (bf16_isa() == "fp32")  # the instruction takes denormals for zeros
    assert torch.equal(back.isnan(), every.isnan())
    assert torch.equal(back[normal].nan_to_num(7.0), every[normal].nan_to_num(7.0))


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 17, 4, 4), (2, 70), (1, 64, 9, 9)])
def test_float32_is_rounded_to_the_nearest_and_halfway_to_the_even(shape: tuple[int, ...]) -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=torch.Generator().manual_seed(0))
    bits[..., 0] = bits[..., 0] & ~0xFFFF | 0x8000  # halfway
    x = bits.to(torch.int32).view(torch.float32)
    x[x.abs() < 1e-30] = 1.0  # denormals
    x.view(-1)[-2:] = torch.tensor([float("nan"), 3.4e38])  # the latter becomes infinite
    graph = convert_graph(torch.bfloat16, shape)
    with guarded() as guards:
        got = run(graph, Candidate("native", 0, 1), {}, [x])
        guards.require_intact()
    assert torch.equal(got.isnan(), x.isnan()) and got.isinf().any()
    assert torch.equal(got.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@pytest.mark.parametrize("tactic", ["native", "eager"])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 15])
def test_a_stem_reads_an_image_of_any_channels_in_pairs(channels: int, tactic: str) -> None:
    """Zeros are written behind an odd number of channels, which the convolution reads, by whatever
    converts."""
    problem = of_bf16(problem_of(2, channels, 9, 8, 32, 3, 3, padding=(1, 1)))
    graph, state = in_bf16(conv_graph(problem)), conv_state(problem)
    image = Node("x", Convert("bfloat16"), ("image",))
    values = {**graph.values, "image": Value(graph.values["x"].shape, torch.float32)}
    both = replace(graph, input="image", nodes=(image, *graph.nodes), values=values)
    x = bf16_inputs(graph)[0]
    x[0, 0, 1, 1] = float("inf")
    for config in every_config(problem):
        choices = [Candidate(tactic, 0, 1), replace(single(config), start=1, stop=2)]
        with guarded() as guards:
            executor = Executor(both, choices, state)
            assert executor.arena.pitch("x") == channels + channels % 2
            (got,) = executor(x.float())
            guards.require_intact()
        want = conv_exactly(graph, state, [x], "direct")
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        require_rounded_once(got[finite], want[finite], 2e-5)


# Instructions


@pytest.fixture
def without_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native_library.ISA_VARIABLE, "fp32")


def answers(names: list[str]) -> list[Tensor]:
    found = []
    for name in names:
        problem = of_bf16(replace(PROBLEMS[name], n=2))
        graph, state = in_bf16(conv_graph(problem)), conv_state(problem)
        for config in every_config(problem):
            found.append(run(graph, single(config), state, bf16_inputs(graph)))
    return found


def test_float32_arithmetic_answers_as_dot_products_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both add the product of a pair's higher channel first, and fuse each multiplication with its
    addition."""
    if bf16_isa() != "bf16":
        pytest.skip("this processor has no AVX512-BF16")
    names = ["ResNet's stem", "no whole vectors", "three slices of a 1x1", "a 3x3 with stride 2"]
    by_dots = answers(names)
    monkeypatch.setenv(native_library.ISA_VARIABLE, "fp32")
    assert bf16_isa() == "fp32"
    assert all(map(torch.equal, answers(names), by_dots))


@pytest.mark.usefixtures("without_dot_products")
@pytest.mark.parametrize("name", PROBLEMS)
def test_without_dot_products_they_are_as_right(name: str) -> None:
    problem = of_bf16(replace(PROBLEMS[name], n=2))
    for config in every_config(problem):
        require_conv_rounded_once(problem, config)


@pytest.fixture
def narrower(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if platform.machine() not in ("x86_64", "AMD64") or "avx2" not in processor().split():
        pytest.skip("this processor has no AVX2")
    level = "x86-64-v3"
    monkeypatch.setattr(
        native_library, "library", lambda _="native", *flags: library(level, *flags, "-O1")
    )
    yield


@pytest.mark.usefixtures("narrower")
def test_narrower_vectors_are_as_right() -> None:
    assert lanes() == 8
    for problem in PROBLEMS.values():
        for config in every_config(of_bf16(problem)):
            require_conv_rounded_once(of_bf16(problem), config)
    test_every_bfloat16_converts_to_float32_and_back()
    for name in ("of no whole vectors", "of an image"):
        require_map(pool_graph(*POOLS[name]), slack=0)
    require_map(pool_graph(Mean(), (2, 70, 3, 3)))


def test_instructions_that_are_unknown_or_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(native_library.ISA_VARIABLE, "avx3")
    with pytest.raises(ValueError, match="RESFUSE_CPU_ISA: 'avx3'; accepted: bf16, fp32"):
        bf16_isa()
    monkeypatch.setattr(native_library, "processor", lambda: "flags : sse2 avx2")
    monkeypatch.setenv(native_library.ISA_VARIABLE, "bf16")
    with pytest.raises(ValueError, match="has no AVX512-BF16"):
        bf16_isa()
    monkeypatch.delenv(native_library.ISA_VARIABLE)
    assert bf16_isa() == "fp32"


def test_mixed_programs_run_each_part_in_its_library() -> None:
    """float32, bfloat16, float32: the same convolution three times, conversions between."""
    problem = problem_of(1, 32, 6, 6, 32, 3, 3, padding=(1, 1))
    state = conv_state(problem)

    def conv(of: object) -> Conv:
        return Conv(of, "w", "b", norm_named("norm"))  # type: ignore[arg-type]

    nodes = (
        Node("a", conv(problem), ("x",)),
        Node("b", Convert("bfloat16"), ("a",)),
        Node("c", conv(of_bf16(problem)), ("b",)),
        Node("d", Convert("float32"), ("c",)),
        Node("y", conv(problem), ("d",)),
    )
    shape = (1, 32, 6, 6)
    narrow = Value(shape, torch.bfloat16)
    values = dict.fromkeys("xady", Value(shape, torch.float32)) | dict.fromkeys("bc", narrow)
    graph = Graph("x", ("y",), nodes, values)
    choices = [next(iter(native.segments(graph, at))) for at in range(5)]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (got,) = Executor(graph, choices, state)(x)
    (want,) = eager.exact(graph, state, [x])
    assert got.dtype == torch.float32
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 8e-3  # it was rounded between, and only there
