"""The open questions about a GPU, asked in this process: 20 s before anything long begins.

A launch that fails a CUDA context fails all that come after it, so the process ends there, and the
parent asks the rest in another (questions.py).
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from resfuse.bench.backends import load
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.layers.kernel_check.checker import attempt, is_lost
from resfuse.bench.layers.kernel_check.trials import TRIALS, Place, Trial
from resfuse.bench.measuring.failure import outcome_of
from resfuse.bench.measuring.measure_case import synchronize
from resfuse.bench.records.outcome import Outcome

Answer = dict[str, Any]


def ask(device: str, skip: set[str], tell: Callable[..., None]) -> None:
    """Asks every question but those to be skipped; ends the process where the device has failed.

    Args:
        tell: called with `began` (a name) before each, and with `name` and `answer` after it.
    """
    for name, question in QUESTIONS.items():
        if name in skip:
            continue
        tell(began=name)
        try:
            answer = question(device)
            synchronize(torch.device(device).type)
        except Exception as error:  # one question's trouble must not cost the others
            answer = _plain(outcome_of(error))
        tell(name=name, answer=answer)
        if torch.device(device).type == "cuda" and is_lost(device):
            os._exit(1)  # a CUDA context that has failed answers nothing any more


def _conv_relu(device: str) -> Answer:
    """Which way to ask cuDNN for conv + ReLU is right and fastest, and what a search for its plans
    costs; from here on backend, tactic and provider go by the answer."""
    if torch.device(device).type != "cuda":
        raise Unavailable("cuDNN needs an NVIDIA GPU")
    found = load("resfuse.kernels.gpu.cudnn.cudnn_probe:probe")(torch.device(device))
    return {"status": "pass", **found}


def _launch(
    kernel: str, wanted: Callable[[Trial], bool], math_mode: str = "fp16"
) -> Callable[[str], Answer]:
    """Launches a kernel into NaN and compares it with fp64 element by element."""

    def question(device: str) -> Answer:
        small = torch.device(device).type == "cpu"
        trials = TRIALS[kernel](Place(device, math_mode, small))
        trial = next((t for t in trials if small or wanted(t)), None)
        if trial is None:
            raise Unavailable(f"{kernel} has no such configuration")
        return {"launch": trial.label, **_plain(attempt(trial, device))}

    return question


def _plain(outcome: Outcome) -> Answer:
    return {"status": outcome.status, "error": outcome.error, **outcome.metrics}


QUESTIONS: dict[str, Callable[[str], Answer]] = {
    "conv + relu": _conv_relu,
    # None of these has ever run on a GPU.
    "stem": _launch("stem", lambda trial: True),
    "split_k": _launch("conv_bn_act_split_k", lambda trial: True),
    "resident tail": _launch("block_tail", lambda trial: trial.config.kept > 0),
    "projection": _launch("conv1x1", lambda trial: "projection" in trial.label),
    "int8": _launch("conv_int8", lambda trial: "descriptors" not in trial.label, "int8"),
    "int8 by descriptors": _launch("conv_int8", lambda trial: "descriptors" in trial.label, "int8"),
    "to int8": _launch("convert_int8", lambda trial: True, "int8"),
    "max-pool in int8": _launch("pool_int8", lambda trial: True, "int8"),
}
