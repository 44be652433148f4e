"""A debug build says which precondition of a step does not hold, and ends the process."""

import faulthandler
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from guarded_pages import GuardedPages
from int8_steps import random_conv
from native_problems import problem_of
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu.conv_candidates import NativeConfig, conv_step
from resfuse.kernels.cpu.library import Storage, library
from resfuse.kernels.cpu.program import Step, activation, kind, lanes, runner, storage_number
from resfuse.kernels.cpu.weight_layout import direct_weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(autouse=True)
def debug_build(monkeypatch: pytest.MonkeyPatch) -> None:
    debug = "-O1", "-DRESFUSE_DEBUG"
    monkeypatch.setattr(
        native_library, "library", lambda _="native", *flags: library("native", *debug, *flags)
    )


@dataclass
class Bound:
    """A convolution whose weights are taken in slices, and the memory that it points to."""

    step: Step
    memory: list[Tensor]


def bound() -> Bound:
    problem = problem_of(1, 160, 5, 5, 32, 3, 3, padding=(1, 1))
    memory = [
        torch.ones(25 * 160), direct_weights(torch.ones(32, 160, 3, 3)), torch.ones(32),
        torch.empty(25 * 32), torch.empty(1 << 16),
    ]  # fmt: skip
    places = dict(zip(("x", "w", "bias", "y", "scratch"), memory, strict=True))
    step = conv_step(
        problem,
        NativeConfig("direct", False, 6),
        **{name: tensor.data_ptr() for name, tensor in places.items()},
        x_pitch=160,
        y_pitch=32,
    )
    return Bound(step, memory)


def run_in_a_child(step: Step, storage: Storage = "fp32") -> tuple[int, str]:
    """How it ended (a signal's number, negative), and what it said."""
    run = runner(storage)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(writing, 2)
        os._exit(run(step, 1, 1))
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text


def test_a_step_that_keeps_them_runs() -> None:
    conv = bound()
    assert conv.step.scratch_pitch > 0
    assert run_in_a_child(conv.step) == (0, "")


BROKEN = {
    "scratch memory of a float less": "s.scratch_pitch >= scratch",
    "no scratch memory": "s.scratch &&",
    "no block": "s.block > 0",
    "a part of a vector": "s.K % LANES == 0",
    "no bias": "s.w && s.bias",
    "a slope that is not there": "s.activation != SLOPE || s.slope",
    "another height": "s.P == windows(",
    "pixels closer than their channels": "s.x_pitch >= s.C",
    "an offset of a step by itself": "s->y_local == -1",
    "more fused steps than there are": "step->length < steps + count",
    "values of the other library's": "s.storage == STORAGE",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_step_that_breaks_one_ends_the_process(how: str) -> None:
    conv = bound()
    step = conv.step
    match how:
        case "scratch memory of a float less":
            step.scratch_pitch -= 1
        case "no scratch memory":
            step.scratch = 0
        case "no block":
            step.block = 0
        case "a part of a vector":
            step.K -= lanes() // 2
        case "no bias":
            step.bias = 0
        case "a slope that is not there":
            step.activation = activation("prelu")
        case "another height":
            step.P += 1
        case "pixels closer than their channels":
            step.x_pitch = 159
        case "an offset of a step by itself":
            step.y_local = 0
        case "values of the other library's":
            step.storage = storage_number("bf16")
        case _:
            step.kind, step.length = kind("chain"), 1
    ended, said = run_in_a_child(step)
    assert ended == -signal.SIGABRT
    assert "precondition does not hold" in said and BROKEN[how] in said


BROKEN_INT8 = {
    "none": "",
    "no scales": "s.scale && s.offset",
    "Winograd's": "s.kind != WINOGRAD",
    "a zero point that is no value": "is_value(s.x_zero)",
    "no scale of y": "is_positive(s.y_inverse_scale)",
    "an infinite scale of the residual": "is_positive(s.residual_scale)",
    "float32 over the residual": "s.residual != s.y",
}


@pytest.mark.parametrize("how", BROKEN_INT8)
def test_likewise_of_uint8(how: str) -> None:
    conv = random_conv(problem_of(1, 16, 5, 5, 32, 3, 3, padding=(1, 1), residual=True))
    config, pages = NativeConfig("direct", False, 6), GuardedPages()
    step, _y, _kept = conv.step(config, pages, in_place=True)
    match how:
        case "no scales":
            step.scale = 0
        case "Winograd's":
            step.kind = kind("winograd")
        case "a zero point that is no value":
            step.x_zero = 256
        case "no scale of y":
            step.y_inverse_scale = 0
        case "an infinite scale of the residual":
            step.residual_scale = float("inf")
        case "float32 over the residual":
            step.y_fp32 = 1
    ended, said = run_in_a_child(step, "u8")
    if how == "none":
        assert (ended, said) == (0, "")
    else:
        assert ended == -signal.SIGABRT
        assert "precondition does not hold" in said and BROKEN_INT8[how] in said
