"""A tiny network as the scenarios of throughput and server have it served, rightly and slowly."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, Backend
from resfuse.bench.measuring import network
from resfuse.bench.measuring.inference import answers
from resfuse.bench.measuring.served_network import ServedNetwork, torch_threads
from resfuse.bench.records.case import Case
from resfuse.resnet_ref import models

CASE = Case("tiny", "eager", "inference", "cpu", "float32", "contiguous", 2, 32)
SLEEP_S = 0.02
Run = Callable[[Tensor], Tensor]


def tiny() -> nn.Module:
    """Answers two images differently, in a millisecond."""
    layers = nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).eval()


@contextmanager
def one_thread_and_tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model "tiny" in the zoo, and one thread of torch's, as share_cores leaves it."""
    for registry in (models.MODELS, models.CIFAR):
        monkeypatch.setitem(registry, "tiny", lambda device=None: tiny().to(device))
    with torch_threads(1):
        yield


def served(
    monkeypatch: pytest.MonkeyPatch, build: str | Callable[..., object] = "eager", cores: int = 2
) -> ServedNetwork:
    """A network that is set up, with its answers known."""
    if callable(build):
        monkeypatch.setitem(BACKENDS, "planted", Backend("a:b", "planted"))
        monkeypatch.setattr(
            "resfuse.bench.backends.load",
            lambda target: build if target == "a:b" else pytest.fail(target),
        )
    name = "planted" if callable(build) else build
    batches = [torch.randn(2, 3, 32, 32) for _ in range(network.TIMED_BATCHES + 1)]
    model = tiny()
    made = ServedNetwork(name, "contiguous", deepcopy(model), batches, cores)
    made.set_up()
    made.expect(answers(model, batches, "ieee"))
    return made


def slow(model: nn.Module, example: Tensor) -> Run:
    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        time.sleep(SLEEP_S)
        answer: Tensor = model(images)
        return answer

    return run
