"""Programs of fused convolutions: what they answer, and where their results lie."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.cpu.conv_calls import ConvCall
from resfuse.kernels.cpu.conv_program import ConvProgram
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.ops.conv_problem import Geometry


class Layer:
    """A convolution in native code, and the same in torch's fp64."""

    def __init__(self, c: int, k: int, kernel: int, groups: int = 1, stride: int = 1) -> None:
        generator = torch.Generator().manual_seed(100 * c + k)
        self.weight = torch.randn(k, c // groups, kernel, kernel, generator=generator) / c**0.5
        self.bias = torch.randn(k, generator=generator)
        padding = kernel // 2, kernel // 2
        self.geometry = Geometry((stride, stride), padding, (1, 1), groups)
        self.native = NativeConv(self.weight, self.bias, self.geometry, "relu", None)

    def __call__(self, x: Tensor, residual: Tensor | float = 0.0) -> Tensor:
        g = self.geometry
        weight, bias = self.weight.double(), self.bias.double()
        return F.relu(
            F.conv2d(x.double(), weight, bias, g.stride, g.padding, 1, g.groups) + residual
        )


def inverted_residual(c: int = 24, wide: int = 48) -> tuple[ConvProgram, Callable[..., Tensor]]:
    expand, depthwise, project = Layer(c, wide, 1), Layer(wide, wide, 3, wide), Layer(wide, c, 1)
    calls = [
        ConvCall(expand.native, 0),
        ConvCall(depthwise.native, 1),
        ConvCall(project.native, 2, residual=0),
    ]
    return ConvProgram(1, calls, [3]), lambda x: project(depthwise(expand(x)), x)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def require_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_block_answers_as_its_layers(memory_format: torch.memory_format) -> None:
    program, want = inverted_residual()
    for shape in [(2, 24, 14, 15), (1, 24, 7, 7), (2, 24, 14, 15)]:
        x = images(*shape).contiguous(memory_format=memory_format)
        before = x.clone()
        (y,) = program(x)
        require_close(y, want(x))
        assert torch.equal(x, before)


def test_results_are_the_callers_own() -> None:
    program, want = inverted_residual()
    x, other = images(1, 24, 9, 9), images(1, 24, 9, 9, seed=1)
    (first,) = program(x)
    (second,) = program(other)
    require_close(first, want(x))
    require_close(second, want(other))


def test_a_projection_is_overwritten_and_the_input_is_not() -> None:
    first, main, projection = (
        Layer(16, 32, 3, stride=2),
        Layer(32, 32, 3),
        Layer(16, 32, 1, stride=2),
    )
    calls = [
        ConvCall(first.native, 0),
        ConvCall(projection.native, 0),
        ConvCall(main.native, 1, residual=2, overwrite=True),
    ]
    x = images(2, 16, 12, 12)
    (y,) = ConvProgram(1, calls, [3])(x)
    require_close(y, main(first(x), projection(x)))


def test_an_input_that_is_overwritten() -> None:
    first, second = Layer(16, 16, 3), Layer(16, 16, 3)
    calls = [ConvCall(first.native, 0), ConvCall(second.native, 1, residual=0, overwrite=True)]
    x = images(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    want = second(first(x), x.double())
    (y,) = ConvProgram(1, calls, [2])(x)
    assert y.data_ptr() == x.data_ptr()
    require_close(y, want)


def test_several_inputs_and_outputs_one_of_which_is_read_again() -> None:
    left, right, last = Layer(8, 16, 1), Layer(12, 16, 3), Layer(16, 40, 1)
    calls = [
        ConvCall(left.native, 0),
        ConvCall(right.native, 1, residual=2),
        ConvCall(last.native, 3),
    ]
    a, b = images(1, 8, 6, 6), images(1, 12, 6, 6)
    middle, end = ConvProgram(2, calls, [3, 4])(a, b)
    want = right(b, left(a))
    require_close(middle, want)
    require_close(end, last(want))


def test_a_long_program_needs_few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty results of one size take turns in two buffers, and answer as one by one."""
    layers = [Layer(16, 16, 3) for _ in range(20)]
    program = ConvProgram(1, [ConvCall(layer.native, i) for i, layer in enumerate(layers)], [20])
    taken: list[int] = []
    empty = torch.empty

    def counted(*shape: object, **settings: object) -> Tensor:
        made = empty(*shape, **settings)
        taken.append(made.numel())
        return made

    x = images(1, 16, 10, 10)
    program(x)  # scratch memory is there from now on
    monkeypatch.setattr(torch, "empty", counted)
    (y,) = program(x)
    monkeypatch.undo()
    assert taken == [1600, 1600, 1600]  # the third one leaves the program
    want = x.double()
    for layer in layers:
        want = layer(want)
    scale = float(want.abs().max())
    torch.testing.assert_close(y.double() / scale, want / scale, rtol=1e-4, atol=1e-5)


def test_threads_have_steps_of_their_own() -> None:
    program, want = inverted_residual()
    inputs = [images(1, 24, 8 + i, 9, seed=i) for i in range(4)]
    wrong: list[str] = []

    def run(x: Tensor) -> None:
        expected = want(x)
        for _ in range(50):
            (y,) = program(x)
            if not torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5):
                wrong.append(f"{list(x.shape)}")

    callers = [threading.Thread(target=run, args=(x,)) for x in inputs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not any(caller.is_alive() for caller in callers) and not wrong


def test_more_shapes_than_are_kept() -> None:
    program, want = inverted_residual()
    for size in [*range(3, 23), 3]:
        x = images(1, 24, size, size)
        require_close(program(x)[0], want(x))


def mobile(c: int, wide: int, k: int, stride: int, residual: bool) -> tuple[ConvProgram, Callable]:
    expand, project = Layer(c, wide, 1), Layer(wide, k, 1)
    depthwise = Layer(wide, wide, 3, wide, stride)
    calls = [
        ConvCall(expand.native, 0),
        ConvCall(depthwise.native, 1),
        ConvCall(project.native, 2, residual=0 if residual else None),
    ]
    adds = (lambda x: x) if residual else lambda x: 0.0
    return ConvProgram(1, calls, [3]), lambda x: project(depthwise(expand(x)), adds(x))


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize(
    ("c", "k", "stride", "residual"), [(24, 24, 1, True), (16, 40, 2, False), (144, 24, 1, False)]
)
def test_large_values_stay_in_strips(c: int, k: int, stride: int, residual: bool) -> None:
    """What lies between, 96 channels of 60 by 70 pixels, has no buffer."""
    program, want = mobile(c, 96, k, stride, residual)
    x = images(2, c, 60, 70)
    (y,) = program(x)
    require_close(y, want(x))
    bound = program._bound(program._asked or threads(), [x])
    assert not bound.buffers and len(bound.steps) == 4  # the run's head, too
    small = images(2, c, 7, 9)
    require_close(program(small)[0], want(small))
    assert len(program._bound(program._asked or threads(), [small]).steps) == 3
    (y,) = program(x)
    require_close(y, want(x))


def test_a_large_value_that_is_read_again_has_a_buffer() -> None:
    expand, depthwise, last = Layer(16, 96, 1), Layer(96, 96, 3, 96), Layer(96, 96, 1)
    calls = [
        ConvCall(expand.native, 0),
        ConvCall(depthwise.native, 1),
        ConvCall(last.native, 2, residual=1),
    ]
    x = images(2, 16, 60, 70)
    (y,) = ConvProgram(1, calls, [3])(x)
    wide = expand(x)
    require_close(y, last(depthwise(wide), wide))


@pytest.mark.usefixtures("thread_counts")
def test_an_input_whose_windows_are_still_to_be_read_is_not_overwritten() -> None:
    """A block may write over its input; strip by strip it would do so too early."""
    expand, depthwise, project = Layer(24, 96, 1), Layer(96, 96, 3, 96), Layer(96, 24, 1)
    calls = [
        ConvCall(expand.native, 0),
        ConvCall(depthwise.native, 1),
        ConvCall(project.native, 2, residual=0, overwrite=True),
    ]
    x = images(1, 24, 60, 70).contiguous(memory_format=torch.channels_last)
    want = project(depthwise(expand(x)), x.double())
    (y,) = ConvProgram(1, calls, [3])(x)
    require_close(y, want)


@pytest.mark.usefixtures("thread_counts")
def test_blocks_in_strips_do_not_share_a_buffer_with_what_they_read() -> None:
    layers = [(Layer(24, 96, 1), Layer(96, 96, 3, 96), Layer(96, 24, 1)) for _ in range(3)]
    calls, value = [], 0
    for expand, depthwise, project in layers:
        first = 1 + len(calls)
        calls += [
            ConvCall(expand.native, value),
            ConvCall(depthwise.native, first),
            ConvCall(project.native, first + 1),
        ]
        value = first + 2
    x = images(1, 24, 60, 70)
    (y,) = ConvProgram(1, calls, [value])(x)
    want = x.double()
    for expand, depthwise, project in layers:
        want = project(depthwise(expand(want)))
    require_close(y, want)
