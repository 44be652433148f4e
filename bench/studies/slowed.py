"""Eager with a tenth of its own time of work on top: the slowdown that `study gate` must see."""

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from resfuse.bench.backends import eager
from resfuse.bench.timing import Step, interleave

SLOWDOWN = 0.10
ROUNDS = 40


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Runs the network, then passes over a small buffer, as often as fills SLOWDOWN of its time as
    measured here and now."""
    network = eager.build(model, example)
    ballast = torch.ones(4096, device=example.device)

    def work(times: int) -> Tensor:
        for _ in range(times):
            ballast.mul_(1.0)
        return ballast

    steps = [_step(lambda: network(example)), _step(lambda: work(100))]
    laps, _ = interleave(steps, example.device.type, 0, ROUNDS, ROUNDS)
    network_ms, hundred_ms = (median(lap[0] for lap in one) for one in laps)
    times = round(SLOWDOWN * network_ms / (hundred_ms / 100))

    def run(images: Tensor) -> Tensor:
        logits = network(images)
        work(times)
        return logits

    return run


def _step(run: Callable[[], Tensor]) -> Step:
    return Step(lambda: None, lambda lap: run(), lambda output: None)
