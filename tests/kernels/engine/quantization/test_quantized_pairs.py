"""`build_engine` of a program that torch's PT2E has quantised computes in int8 by its scales. The
programs are written by hand, of the operations that torch itself registers: torchao is not
needed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hand_quantized import NETWORKS, OPS, S8, U8, Kind, Pair, Weight, pairs_of
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture, is_in_training
from resfuse.kernels.engine.ir.graph import Conv, Graph, Torch
from resfuse.kernels.engine.quantization.given_scales import with_given_scales
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.ops.quantization import LEAST_WEIGHT, quantize, quantize_weights
from scope import Scope

SHAPE = (3, 3, 17, 17)


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def observed(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with scales for numbers like x."""
    model.eval()(x)
    return model


def read_by_convolutions(graph: Graph) -> set[torch.dtype]:
    return {graph.values[n.inputs[0]].dtype for n in graph.nodes if isinstance(n.op, Conv)}


@torch.no_grad()
def by_twins(model: nn.Module, x: Tensor) -> tuple[Graph, Tensor]:
    """The graph of a model on integers, and its answer by the twins of the kernels."""
    graph, state = capture(model, x)
    narrow = with_given_scales(graph, state)
    values = {narrow.input: x}
    for node in narrow.nodes:
        function = eager.function_of(node, narrow.values, state)
        values[node.name] = function(*(values[name] for name in node.inputs))
    return narrow, values[narrow.outputs[0]]


@torch.no_grad()
def require_each_step_alike(model: nn.Module, x: Tensor) -> None:
    """Raises AssertionError unless each node on integers gives the integers that the program's
    numbers are rounded to, of what the program's numbers are, but for numbers halfway between."""
    graph, state = capture(model, x)
    wanted = {graph.input: x}
    for node in graph.nodes:
        function = eager.function_of(node, graph.values, state)
        wanted[node.name] = function(*(wanted[name] for name in node.inputs))
    narrow = with_given_scales(graph, state)

    def given(name: str) -> Tensor:
        stored = narrow.values[name].quantization
        return wanted[name] if stored is None else quantize(wanted[name], stored)

    compared = [n for n in narrow.nodes if narrow.values[n.name].quantization is not None]
    for node in compared:
        function = eager.function_of(node, narrow.values, state)
        y = function(*map(given, node.inputs)).int()
        off = (y - given(node.name).int()).abs()
        assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 0.002, node
    assert len(compared) > 5


def require_near(y: Tensor, want: Tensor) -> None:
    """Numbers halfway between two integers move others behind them, so no step is asked for."""
    assert relative_error(y, want) < 0.02


def relative_error(y: Tensor, want: Tensor) -> float:
    return float((y - want).double().norm() / want.double().norm())


@pytest.mark.parametrize("kind", [U8, S8], ids=["u8", "s8"])
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_is_computed_on_integers(name: str, kind: Kind, by_channel: bool) -> None:
    model, x = observed(NETWORKS[name](kind, by_channel), images()), images(seed=2)
    graph, y = by_twins(model, x)
    assert read_by_convolutions(graph) == {torch.uint8}
    calls = {node.op.target for node in graph.nodes if isinstance(node.op, Torch)}
    assert calls <= {"aten.reshape.default"}  # rounded before and behind it
    kept = {value.quantization for value in graph.values.values()} - {None}
    assert kept == {pair.stored for pair in pairs_of(model)}
    require_near(y, model(x))
    require_each_step_alike(model, x)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("residual", U8), ("joined", S8)])
def test_an_engine_of_an_exported_program(name: str, kind: Kind, tmp_path: Path) -> None:
    model, x = observed(NETWORKS[name](kind, True), images()), images(seed=2)
    free = ({0: torch.export.Dim("n", min=1, max=8)},)
    program = torch.export.export(model, (x,), dynamic_shapes=free).module()
    with pytest.raises(NotImplementedError):
        program.eval()  # and its modules say that they are in training mode
    engine = build_engine(program, x, batch_sizes=[1, 3], tiling=False, other_batches="pad")
    assert engine.precision == "int8"
    for graph in engine.graphs:
        assert read_by_convolutions(graph) == {torch.uint8}
    engine.save(tmp_path / "engine")
    again = load_engine(tmp_path / "engine")
    for n in (1, 2, 3):
        y = engine(x[:n]).clone()
        require_near(y, model(x[:n]))
        assert torch.equal(again(x[:n]), y)


def test_weights_reach_minus_128() -> None:
    """PT2E's scale of a channel is its largest magnitude / 127.5, and -127.5 is rounded to -128."""
    weight = Weight(24, 3, 3, 3)
    narrow, scale = quantize_weights(weight().double())
    assert torch.equal(narrow, weight.whole) and int(narrow.min()) == LEAST_WEIGHT
    torch.testing.assert_close(scale.float(), weight.scales)
    both = torch.tensor([[128.0, -128.0, 3.0], [-128.0, 127.0, 3.0]]).view(2, 3, 1, 1)
    narrow, scale = quantize_weights(both.double())
    assert narrow.amin((1, 2, 3)).tolist() == [-127, -128] and scale[1] == 1


def test_programs_in_training_mode_are_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout()), images()
    exported = torch.export.export(model, (x,)).module()
    for program in (torch.fx.symbolic_trace(model), exported):
        with pytest.raises(ValueError, match="training mode"):
            build_engine(program, x)
    capture(torch.export.export(model.eval(), (x,)).module(), x)
    assert not is_in_training(torch.export.export(model, (x,)).module())


def convolved(of: Callable[[Tensor], Tensor], weight: nn.Module | None = None) -> nn.Module:
    """A convolution of what a function makes of the images."""
    return Scope(lambda s, x: F.conv2d(of(x), s.w()), w=weight or Weight(8, 3, 3, 3))


def rounded(x: Tensor, *how: Any) -> Tensor:
    q = OPS.quantize_per_tensor.default(x, *how)
    return OPS.dequantize_per_tensor.default(q, *how)


def by_channel(x: Tensor) -> Tensor:
    how = torch.tensor([0.02, 0.03, 0.04]), torch.tensor([100, 128, 9]), 1, *U8
    q = OPS.quantize_per_channel.default(x, *how)
    return OPS.dequantize_per_channel.default(q, *how)


def dynamic(x: Tensor) -> Tensor:
    found = OPS.choose_qparams.tensor(x, 0, 255, 2.0**-12, torch.uint8)
    q = OPS.quantize_per_tensor.tensor(x, *found, *U8)
    return OPS.dequantize_per_tensor.tensor(q, *found, *U8)


def by_scales_in_tensors(x: Tensor) -> Tensor:
    how = torch.tensor(0.02), torch.tensor(120), *U8
    q = OPS.quantize_per_tensor.tensor(x, *how)
    return OPS.dequantize_per_tensor.tensor(q, *how)


def by_token(x: Tensor) -> Tensor:
    found = OPS._choose_qparams_per_token_asymmetric_impl.default(x, torch.int8)
    q = OPS.quantize_per_token.default(x, *found, *S8)
    return OPS.dequantize_per_token.default(q, *found, *S8, torch.float32)


def moved_as_integers(x: Tensor) -> Tensor:
    q = OPS.quantize_per_tensor.default(x, 0.02, 117, *U8)
    return OPS.dequantize_per_tensor.default(q.flip(1), 0.02, 117, *U8)


def scaled_again(x: Tensor) -> Tensor:
    q = OPS.quantize_per_tensor.default(x, 0.02, 117, *U8)
    return OPS.dequantize_per_tensor.default(q, 0.03, 110, *U8)


def as_bfloat16(x: Tensor) -> Tensor:
    q = OPS.quantize_per_tensor.default(x.bfloat16(), 0.02, 117, *U8)
    y = OPS.dequantize_per_tensor.default(q, 0.02, 117, *U8, out_dtype=torch.bfloat16)
    return y.float()


def in_halves(x: Tensor) -> Tensor:
    y = OPS.convert_element_type.no_fuse(x, torch.float16)
    return OPS.convert_element_type.no_fuse(y, torch.float32)


class Asymmetric(Weight):
    def forward(self) -> Tensor:
        zeros = torch.arange(8) - 3
        return OPS.dequantize_per_channel.default(self.whole, self.scales, zeros, 0, *S8)


class InGroups(Weight):
    """Four bits, and a scale for each group of nine weights."""

    def forward(self) -> Tensor:
        whole = (self.whole // 16).flatten(1)
        scales = self.scales[:, None] * torch.tensor([1.0, 2.0, 0.5])
        zeros = torch.zeros(8, 3, dtype=torch.int64)
        how = scales, zeros, -8, 7, torch.int8, 9, torch.float32
        return OPS.dequantize_per_channel_group.default(whole, *how).view(8, 3, 3, 3)


class NotFolded(Weight):
    def forward(self) -> Tensor:
        real = self.whole * self.scales.view(-1, 1, 1, 1)
        q = OPS.quantize_per_channel.default(real, self.scales, self.zeros, 0, *S8)
        return OPS.dequantize_per_channel.default(q, self.scales, self.zeros, 0, *S8)


# What a convolution reads, and whether it computes on integers.
OTHER_WAYS: dict[str, tuple[nn.Module, bool]] = {
    "a scale for each channel of an activation": (convolved(by_channel), False),
    "scales of each call": (convolved(dynamic), False),
    "scales in tensors": (convolved(by_scales_in_tensors), False),
    "a scale for each row": (convolved(by_token), False),
    "integers that are moved": (convolved(moved_as_integers), False),
    "another scale behind": (convolved(scaled_again), False),
    "bfloat16": (convolved(as_bfloat16), False),
    "float16": (convolved(in_halves), False),
    "16 bits": (convolved(lambda x: rounded(x, 1e-4, 0, -32768, 32767, torch.int16)), False),
    "seven bits": (convolved(lambda x: rounded(x, 0.04, 60, 0, 127, torch.uint8)), False),
    "float8": (
        convolved(lambda x: rounded(x, 0.02, 0, -448, 448, torch.float8_e4m3fn)), False
    ),
    "weights with a zero point": (
        convolved(lambda x: rounded(x, 0.03, 117, *U8), Asymmetric(8, 3, 3, 3)), False
    ),
    "four bits in groups": (
        convolved(lambda x: rounded(x, 0.03, 117, *U8), InGroups(8, 3, 3, 3)), True
    ),
    "weights that are made integers by the program": (
        convolved(lambda x: rounded(x, 0.03, 117, *U8), NotFolded(8, 3, 3, 3)), True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_other_ways_to_round_are_computed_as_they_are(name: str) -> None:
    model, narrow = OTHER_WAYS[name]
    x = images(2, 3, 9, 9)
    graph, y = by_twins(model.eval(), x)
    expected = torch.uint8 if narrow else torch.float32
    assert read_by_convolutions(graph) == {expected}
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scales of each call", "float8", "integers that are moved"])
def test_torch_computes_them_in_an_engine(name: str, tmp_path: Path) -> None:
    model, x = OTHER_WAYS[name][0].eval(), images(2, 3, 9, 9)
    engine = build_engine(model, x)
    torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
    engine.save(tmp_path / "engine")
    assert torch.equal(load_engine(tmp_path / "engine")(x), engine(x))


def test_images_with_a_scale_in_common_are_not_filled_up() -> None:
    model = OTHER_WAYS["scales of each call"][0].eval()
    with pytest.raises(ValueError, match="not known to keep the images of a batch apart"):
        build_engine(model, images(2, 3, 9, 9), other_batches="pad")


def test_integers_may_be_returned_as_well() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        q = OPS.quantize_per_tensor.default(x, 0.03, 117, *U8)
        y = F.conv2d(OPS.dequantize_per_tensor.default(q, 0.03, 117, *U8), s.w())
        return y + q[:, :1, 1:-1, 1:-1]

    model, x = Scope(forward, w=Weight(8, 3, 3, 3)).eval(), images(2, 3, 9, 9)
    graph, y = by_twins(model, x)
    assert read_by_convolutions(graph) == {torch.float32}
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_values_without_another_reader_are_rounded_once_for_several() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        q = OPS.quantize_per_tensor.default(x, 0.03, 117, *U8)
        first, second = (OPS.dequantize_per_tensor.default(q, 0.03, 117, *U8) for _ in range(2))
        return F.conv2d(first, s.v()) + F.conv2d(second, s.w())

    model = Scope(forward, v=Weight(8, 3, 3, 3), w=Weight(8, 3, 3, 3)).eval()
    x = images(2, 3, 9, 9)
    graph, _ = capture(model, x)
    roundings = [n for n in graph.nodes if n.name.endswith(":rounded")]
    assert len(roundings) == 1
    narrow, y = by_twins(model, x)
    assert torch.uint8 in read_by_convolutions(narrow)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-4)


def test_the_operations_are_found_in_a_process_that_has_not_imported_them() -> None:
    name = "quantized_decomposed.quantize_per_tensor.default"
    said = (
        "from resfuse.kernels.engine.ir.torch_operations import is_pure, operation_named\n"
        f"assert is_pure({name!r}) and not is_pure('quantized_decomposed.other.default')\n"
        f"print(operation_named({name!r}))"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name


def test_scales_are_those_of_the_pair() -> None:
    pair = Pair(S8)
    pair.how = 0.05, -7, *S8
    graph, state = capture(Scope(lambda s, x: s.q(x) * 2, q=pair).eval(), images(2, 3, 9, 9))
    found = {v.quantization for v in with_given_scales(graph, state).values.values()}
    assert pair.stored in found and pair.stored.zero_point == 121
