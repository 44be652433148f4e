"""Traces a forward as it runs in training mode, and refuses what a graph of it would do otherwise:
numbers drawn while it is traced, functions with gradients of their own, checkpoints, and
contexts that change gradients or dtypes. For answers alone, in eval mode, most of it is no matter.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from resfuse.kernels.fusion.tracing.module_tracing import Call, NotTraceable, Trace, trace


def trace_for_training(module: nn.Module, call: Call) -> Trace:
    """Traces `module.forward`, called in a given way, in training mode.

    Raises:
        NotTraceable: with the reason.
    """
    mode, module.training = module.training, True
    try:
        with _refuse_random_numbers(), _no_gradients_of_its_own():
            traced = trace(module, call)
    finally:
        module.training = mode
    if traced.asks_types:
        raise NotTraceable("forward asks for the type of its argument")
    return traced


@contextmanager
def _refuse_random_numbers() -> Iterator[None]:
    """Refuses a forward that draws numbers while it is traced: the graph would draw them once and
    for all. (What draws on tensors, like dropout, is recorded and draws anew in every run.)

    Raises:
        NotTraceable: it does.
    """
    before, drawn = random.getstate(), torch.get_rng_state()
    try:
        yield
        changed = random.getstate() != before or not torch.equal(torch.get_rng_state(), drawn)
    finally:
        random.setstate(before)
        torch.set_rng_state(drawn)
    if changed:
        raise NotTraceable("forward draws random numbers in training mode")


@contextmanager
def _no_gradients_of_its_own() -> Iterator[None]:
    """Refuses autograd.Function, whose backward a graph of its forward would not have, and hooks on
    saved tensors, which is how torch.utils.checkpoint and offloading work.

    Raises:
        NotTraceable: in the forward that uses one.
    """

    def function(*_: Any, **__: Any) -> Any:
        raise NotTraceable("forward calls an autograd.Function or a checkpoint")

    def hooks(*_: Any, **__: Any) -> Any:
        raise NotTraceable("forward sets hooks on saved tensors, as checkpoints do")

    with (
        patch.object(torch.autograd.Function, "apply", function),
        patch.object(torch.autograd.graph.saved_tensors_hooks, "__enter__", hooks),
    ):
        yield
