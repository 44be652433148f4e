"""Computes a convolution of few output tiles with its reduction split over multiprocessors, by one
Triton kernel.

A problem allows dozens of splits, and each takes a compilation and a measurement, so only those
with the least estimated time are offered.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.ir.lowered import Call
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_conv, triton_kernels
from resfuse.kernels.gpu.conv import conv_config
from resfuse.kernels.gpu.split_k.split_k_config import Config, candidates, cycles
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.tuning_cache.denylist import Key, key_of

if TYPE_CHECKING:
    from resfuse.kernels.gpu.common.launch import Launch
    from resfuse.kernels.gpu.conv.conv_arguments import Tensors

MOST = 4

refusal = triton_kernels.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    op = graph.nodes[at].op
    if not isinstance(op, Conv) or op.problem.is_quantized:
        return
    for config in _configs(op.problem, triton_kernels.multiprocessors(graph)):
        settings = asdict(config)
        flat = {**settings.pop("tile"), **settings}
        yield Candidate("split_k", at, at + 1, tuple(flat.items()))


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    from resfuse.kernels.gpu.split_k.split_k import Workspace, launch, workspace

    op = graph.nodes[candidate.start].op
    assert isinstance(op, Conv)
    problem, config = op.problem, _config(candidate)
    made = workspace(problem, config, state[op.weight].device)
    counters, partials = made.counters, made.partials.numel()  # counters end each run as zeros
    arena.track([counters])

    def launch_of(t: "Tensors") -> "Launch":
        # The partial sums are only needed during the launch; afterwards their memory is reused.
        parts = torch.empty(partials, dtype=torch.float32, device=counters.device)
        return launch(problem, t, config, Workspace(parts, counters))

    return triton_kernels.convolution(graph, candidate, state, arena, launch_of)


def configuration(graph: Graph, candidate: Candidate) -> Key:
    mode = triton_kernels.math_mode(graph, candidate)
    return key_of("conv_bn_act_split_k", mode, _config(candidate))


def _config(candidate: Candidate) -> Config:
    settings = candidate.settings
    splits = settings.pop("split_taps"), settings.pop("split_channels")
    return Config(conv_config.Config(**settings), *splits)


def _configs(problem: ConvProblem, sms: int) -> list[Config]:
    """Returns configurations with fewer tiles than multiprocessors, the fastest by estimate
    first."""
    if problem.c < triton_conv.LEAST_CHANNELS:
        return []
    few = [
        config
        for config in candidates(problem)
        if config.splits > 1 and _count(config.tile.tiles(problem)) < sms
    ]
    return sorted(few, key=lambda config: cycles(problem, config, sms))[:MOST]


def _count(tiles: tuple[int, int]) -> int:
    return tiles[0] * tiles[1]
