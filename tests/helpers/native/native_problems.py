"""Convolutions and pools for the native steps to get right, and the judge of whether they do."""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from graphs import conv_graph, conv_state, inputs_of, require_right
from resfuse.kernels.cpu.conv_candidates import Form, NativeConfig, configs, forms
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, MaxPool, State
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics.cpu import native
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of


def problem_of(
    n: int, c: int, h: int, w: int, k: int, r: int, s: int,
    activation: str = "relu", residual: bool = False, **window: Any,
) -> ConvProblem:  # fmt: skip
    geometry, epilogue = Geometry(**window), Epilogue.of(activation, residual)
    return ConvProblem(n, c, h, w, k, r, s, geometry, epilogue, dtypes_of("ieee"))


# Small maps; the numbers of channels are those that make the code take another branch. A vector has
# 16, 8 or 4 floats, a panel 64, 16 or 8 channels, a slice of weights 128 input channels.
PROBLEMS = {
    "ResNet's stem": problem_of(1, 3, 33, 29, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
    "CIFAR's stem": problem_of(1, 3, 9, 9, 16, 3, 3, padding=(1, 1)),
    "a block's 3x3": problem_of(1, 64, 14, 14, 64, 3, 3, padding=(1, 1)),
    "prime sizes": problem_of(1, 48, 13, 17, 80, 3, 3, padding=(1, 1)),
    "a 3x3 without padding": problem_of(1, 32, 7, 6, 32, 3, 3),
    "a 3x3 with stride 2": problem_of(1, 32, 15, 14, 48, 3, 3, stride=(2, 2), padding=(1, 1)),
    "a 3x3 on a map of one pixel": problem_of(1, 64, 1, 1, 64, 3, 3, padding=(1, 1)),
    "a 1x1": problem_of(1, 64, 7, 7, 256, 1, 1),
    "a projection": problem_of(1, 64, 7, 9, 128, 1, 1, stride=(2, 2)),
    "stride 3": problem_of(1, 16, 11, 13, 32, 3, 3, stride=(3, 3), padding=(1, 1)),
    "a linear layer of 10": problem_of(1, 64, 1, 1, 10, 1, 1, "identity"),
    "a linear layer of 1000": problem_of(1, 512, 1, 1, 1000, 1, 1, "identity"),
    "a linear layer behind a flatten": problem_of(1, 33, 5, 4, 10, 5, 4, "identity"),
    "one channel": problem_of(1, 1, 5, 7, 1, 3, 3, padding=(1, 1)),
    "no whole vectors": problem_of(1, 37, 6, 5, 43, 3, 3, padding=(1, 1)),
    "just under a vector": problem_of(1, 15, 6, 5, 17, 3, 3, padding=(1, 1)),
    "two uneven slices": problem_of(1, 130, 5, 5, 70, 3, 3, padding=(1, 1)),
    "two whole slices": problem_of(1, 256, 5, 6, 64, 3, 3, padding=(1, 1)),
    "three slices of a 1x1": problem_of(1, 257, 5, 5, 65, 1, 1),
    "a row": problem_of(1, 32, 7, 9, 32, 1, 7, padding=(0, 3)),
    "a column": problem_of(1, 32, 7, 9, 32, 7, 1, padding=(3, 0)),
    "uneven strides": problem_of(1, 8, 9, 10, 24, 3, 5, stride=(2, 1), padding=(0, 2)),
    "dilation": problem_of(1, 32, 9, 10, 32, 3, 3, padding=(2, 3), dilation=(2, 3)),
    "dilation of few channels": problem_of(1, 3, 9, 10, 32, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "a window larger than the map": problem_of(1, 16, 2, 2, 16, 5, 5, padding=(2, 2)),
    "windows of nothing but padding": problem_of(1, 16, 3, 3, 16, 1, 1, padding=(2, 2)),
    "depthwise": problem_of(1, 64, 9, 7, 64, 3, 3, padding=(1, 1), groups=64),
    "depthwise with stride 2": problem_of(
        1, 32, 9, 7, 32, 5, 5, stride=(2, 2), padding=(2, 2), groups=32
    ),
    "depthwise of no whole vectors": problem_of(1, 58, 9, 7, 58, 3, 3, padding=(1, 1), groups=58),
    "depthwise of few channels": problem_of(
        1, 5, 9, 7, 5, 5, 5, stride=(2, 2), padding=(2, 2), groups=5
    ),
    "groups of 4 in no whole vectors": problem_of(
        1, 20, 7, 7, 20, 3, 3, padding=(1, 1), groups=5, residual=True
    ),
    "groups of 2": problem_of(1, 32, 7, 7, 32, 3, 3, padding=(1, 1), groups=16),
    "groups of 4": problem_of(1, 128, 7, 7, 128, 3, 3, padding=(1, 1), groups=32),
    "groups of 8": problem_of(1, 64, 7, 7, 64, 3, 3, padding=(1, 1), groups=8),
    "groups of 16": problem_of(1, 64, 7, 7, 64, 3, 3, padding=(1, 1), groups=4),
    "groups of whole vectors": problem_of(1, 96, 7, 7, 192, 3, 3, padding=(1, 1), groups=2),
    "groups with few channels in": problem_of(1, 6, 7, 7, 96, 3, 3, padding=(1, 1), groups=2),
    "groups of 24, as RegNetY's": problem_of(1, 48, 7, 7, 48, 3, 3, padding=(1, 1), groups=2),
    "groups of 120 with a residual": problem_of(
        1, 240, 5, 7, 240, 3, 3, padding=(1, 1), groups=2, residual=True
    ),
    "groups of 120 with stride 2": problem_of(
        1, 240, 7, 6, 240, 3, 3, "gelu", stride=(2, 2), padding=(1, 1), groups=2
    ),
    "groups of odd numbers of channels": problem_of(
        1, 27, 6, 5, 51, 3, 3, "prelu", padding=(1, 1), groups=3
    ),
    "1x1 in groups of no whole vectors": problem_of(1, 66, 5, 5, 330, 1, 1, groups=2),
    "deep groups of no whole vectors": problem_of(
        1, 320, 5, 6, 160, 3, 3, padding=(1, 1), groups=2
    ),
}
FORMS = {  # one problem that each loop of the library computes
    "direct, all weights at once": ("direct", PROBLEMS["CIFAR's stem"]),
    "direct, slices of weights": ("direct", PROBLEMS["no whole vectors"]),
    "winograd": ("winograd", PROBLEMS["a 3x3 without padding"]),
    "grouped": ("grouped", PROBLEMS["groups of 4"]),
}


POOLS = {
    "ResNet's": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (2, 64, 13, 9)),
    "VGG's": (MaxPool((2, 2), (2, 2), (0, 0), (1, 1)), (1, 32, 7, 6)),
    "GoogLeNet's": (MaxPool((3, 3), (1, 1), (1, 1), (1, 1)), (3, 48, 5, 5)),
    "of no whole vectors": (MaxPool((3, 2), (1, 3), (1, 0), (1, 1)), (1, 70, 5, 7)),
    "of an image": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (2, 3, 8, 7)),
    "SqueezeNet's, rounding up": (MaxPool((3, 3), (2, 2), (0, 0), (1, 1), True), (2, 64, 14, 8)),
    "padded and rounding up": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1), True), (1, 32, 14, 9)),
    "dilated": (MaxPool((2, 3), (1, 2), (1, 1), (3, 2)), (1, 16, 9, 8)),
    "of one pixel": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (1, 16, 1, 1)),
    "Darknet's": (MaxPool((2, 2), (1, 1), (0, 0), (1, 1), padding_after=(1, 1)), (2, 32, 6, 7)),
    "padded widely": (
        MaxPool((3, 3), (1, 2), (2, 0), (1, 1), padding_after=(2, 1)),
        (1, 70, 5, 8),
    ),
}


def executor_of(problem: ConvProblem, config: NativeConfig, state: State) -> tuple[Graph, Executor]:
    graph = conv_graph(problem)
    choice = Candidate("native", 0, 1, tuple(asdict(config).items()))
    return graph, Executor(graph, [choice], state)


def require_conv(problem: ConvProblem, config: NativeConfig) -> None:
    state = conv_state(problem)
    graph, executor = executor_of(problem, config, state)
    # sums are of unit size; ReLU may leave a few that are nearly nothing, and all rounding
    require_right(graph, executor, state, inputs_of(graph), scale=1.0)


def require_native(graph: Graph, state: State, *inputs: Tensor) -> None:
    """For what has no configuration."""
    (choice,) = native.segments(graph, 0)
    require_right(graph, Executor(graph, [choice], state), state, inputs or inputs_of(graph))


def every_config(problem: ConvProblem) -> list[NativeConfig]:
    return [config for form in forms(problem) for config in configs(form, problem)]


def config_of(form: Form, problem: ConvProblem) -> NativeConfig:
    return next(configs(form, problem))
