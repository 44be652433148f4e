"""Chains and strips of convolutions on uint8 give the bits of their steps one by one."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from guarded_pages import GuardedPages
from int8_steps import Int8Conv, random_conv, whole
from native_problems import problem_of
from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.program import (
    Step,
    fused_run,
    kind,
    local_floats,
    local_pixels,
    require_done,
    runner,
    storage_number,
    whole_lines,
    whole_vectors,
)
from resfuse.kernels.cpu.row_fusion import RowLayout
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.ops.quantization import max_pool_ref

pytestmark = pytest.mark.slow


def run_steps(steps: list[Step], threads: int) -> None:
    require_done(runner("u8")((Step * len(steps))(*steps), len(steps), threads))


def one_behind_the_other(*problems: ConvProblem, zero_point: int = 7) -> list[Int8Conv]:
    """Returns convolutions each of which reads what the one before it computes, and the last of
    which has a residual where its problem does."""
    convs: list[Int8Conv] = []
    for i, problem in enumerate(problems):
        conv = random_conv(problem, i, zero_point, output_zero=40 + i)
        if convs:
            before = convs[-1]
            assert before.output is not None
            conv = replace(conv, x=before.expected(), stored=before.output)
            conv = replace(conv, output=random_conv(problem, i, 40, before.output.scale).output)
        convs.append(conv)
    return convs


def joined(
    convs: list[Int8Conv], configs: list[NativeConfig], pages: GuardedPages
) -> tuple[list[Step], Tensor, list[object]]:
    """Returns steps whose inner values, and what is added to them, have whole vectors of channels;
    the last one's y [N, P, Q, K]; and what they read."""
    steps, kept = [], []
    for conv, config in zip(convs, configs, strict=True):
        step, y, read = conv.step(config, pages)
        steps.append(step)
        kept += [y, *read]
        if conv.residual is not None and conv is not convs[-1]:
            residual = pages.place(whole(conv.residual))
            step.residual, step.residual_pitch = residual.data_ptr(), residual.shape[-1]
            kept.append(residual)
    for before, behind, conv in zip(steps, steps[1:], convs, strict=False):
        before.y_pitch = behind.x_pitch = whole_vectors(conv.problem.k)
        before.unstored = 0
    return steps, y, kept


@pytest.mark.parametrize("first", ["3x3", "grouped", "1x1"])
@pytest.mark.parametrize("threads", [1, 3])
def test_chains(first: str, threads: int) -> None:
    head = {
        "3x3": problem_of(2, 20, 7, 9, 36, 3, 3, padding=(1, 1)),
        "grouped": problem_of(2, 64, 7, 9, 64, 3, 3, padding=(1, 1), groups=32),
        "1x1": problem_of(2, 300, 7, 9, 44, 1, 1),
    }[first]
    convs = one_behind_the_other(
        head, problem_of(2, head.k, 7, 9, 130, 1, 1, residual=True),
        problem_of(2, 130, 7, 9, 17, 1, 1, "silu"),
    )  # fmt: skip
    want = convs[-1].run(next(conv_candidates.candidates(convs[-1].problem)))
    form: conv_candidates.Form = "grouped" if head.groups > 1 else "direct"
    pages = GuardedPages()
    config = NativeConfig(form, False, 12)
    lead = conv_candidates.conv_step(convs[0].problem, config)
    pixels = local_pixels(fused_run("chain", [lead]))
    following = NativeConfig("direct", False, pixels)
    steps, y, _kept = joined(convs, [config, following, following], pages)
    offset = whole_lines(max(step.scratch_pitch for step in steps))
    for before, behind in pairwise(steps):
        before.y_local = behind.x_local = offset
        offset += local_floats(before, pixels * before.y_pitch)
    scratch = pages.place(torch.zeros(offset * threads))
    for step in steps:
        step.scratch, step.scratch_pitch = scratch.data_ptr(), offset
    run_steps(fused_run("chain", steps, scratch=scratch.data_ptr(), scratch_pitch=offset), threads)
    pages.require_intact()
    assert torch.equal(y.permute(0, 3, 1, 2), want)


@pytest.mark.parametrize("zero_point", [0, 130])
@pytest.mark.parametrize("reader", ["3x3", "grouped", "with a 1x1 behind"])
@pytest.mark.parametrize("threads", [1, 2])
def test_strips(reader: str, zero_point: int, threads: int) -> None:
    first = problem_of(2, 13, 9, 8, 32, 1, 1)
    groups = 1 if reader == "3x3" else 32
    window = problem_of(2, 32, 9, 8, 32, 3, 3, stride=(2, 2), padding=(1, 1), groups=groups)
    behind = [problem_of(2, 32, window.p, window.q, 24, 1, 1)] if "behind" in reader else []
    convs = one_behind_the_other(first, window, *behind, zero_point=zero_point)
    want = convs[-1].run(next(conv_candidates.candidates(convs[-1].problem)))
    pages = GuardedPages()
    form: conv_candidates.Form = "direct" if groups == 1 else "grouped"
    both = [NativeConfig("direct", False, 12), NativeConfig(form, False, 12)]
    plain = [
        conv_candidates.conv_step(conv.problem, config)
        for conv, config in zip(convs, both, strict=False)
    ]
    for step in plain:
        step.x_pitch = step.y_pitch = 32
    layout = RowLayout(plain[0], plain[1], [conv.problem for conv in convs[2:]], 2)
    steps, y, _kept = joined(convs, [*both, *(layout.following for _ in behind)], pages)
    scratch = pages.place(torch.zeros(layout.floats * threads or 1))
    run_steps(layout.fuse(steps, scratch.data_ptr()), threads)
    pages.require_intact()
    assert torch.equal(y.permute(0, 3, 1, 2), want)


def test_a_stem_and_its_pool() -> None:
    (conv,) = one_behind_the_other(
        problem_of(2, 3, 20, 18, 64, 7, 7, stride=(2, 2), padding=(3, 3))
    )
    want = max_pool_ref(conv.expected(), (3, 3), (2, 2), (1, 1), (1, 1))
    pages = GuardedPages()
    n, k, p, q = want.shape
    y = pages.place(torch.zeros(n, p, q, k, dtype=torch.uint8))
    step, _, _kept = conv.step(NativeConfig("direct", False, 12), pages)
    pool = Step(
        kind=kind("max_pool"), storage=storage_number("u8"), N=n, C=k, K=k, H=step.P, W=step.Q,
        P=p, Q=q, R=3, S=3, stride_h=2, stride_w=2, pad_h=1, pad_w=1, dilation_h=1, dilation_w=1,
        x_pitch=k, y_pitch=k, y=y.data_ptr(),
    )  # fmt: skip
    layout = RowLayout(step, pool, [], 2)
    for threads in (1, 2):
        scratch = pages.place(torch.zeros(layout.floats * threads))
        run_steps(layout.fuse([step, pool], scratch.data_ptr()), threads)
        pages.require_intact()
        assert torch.equal(y.permute(0, 3, 1, 2), want)
        y.zero_()
