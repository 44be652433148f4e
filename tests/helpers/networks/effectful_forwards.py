"""Forwards that do more than compute: each changes something that a model, its class or its module
keeps, or draws random numbers.
"""

import random
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG: list[Any] = []
COUNTS = {"calls": 0}
CALLS = 0


class Layers(nn.Module):
    kept_by_class: list[Any] = []  # noqa: RUF012
    calls_of_class = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.kept: list[Any] = []
        self.cache: dict[str, Any] = {}
        self.seen: set[Any] = set()
        self.queue: deque[Any] = deque(maxlen=2)
        self.nested = {"a": {"b": [0]}}
        self.meter = Meter()
        self.calls = 0
        self.tensor = torch.zeros(1)
        self.register_buffer("count", torch.zeros(1))
        self.rng = random.Random(0)
        self.numpy_rng = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.iterator = iter(range(1000))
        self.noise_std = 0.0

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Meter:
    def __init__(self) -> None:
        self.values: list[Any] = []
        self.count = 0

    def update(self, value: Any) -> None:
        self.count += 1
        self.values.append(value)


def kind(forward: Any) -> Any:
    """Makes a model with that forward."""
    return lambda: type(forward.__name__, (Layers,), {"forward": forward})()


def own_list(m: Any, x: Tensor) -> Tensor:
    m.kept.append(y := m.body(x))
    return y


def list_by_index(m: Any, x: Tensor) -> Tensor:
    m.kept[:] = [m.body(x)]
    return m.kept[0]


def own_dict(m: Any, x: Tensor) -> Tensor:
    m.cache["y"] = y = m.body(x)
    return y


def own_set(m: Any, x: Tensor) -> Tensor:
    m.seen.add("called")
    return m.body(x)


def own_queue(m: Any, x: Tensor) -> Tensor:
    m.queue.append(1)
    return m.body(x) * len(m.queue)


def nested(m: Any, x: Tensor) -> Tensor:
    m.nested["a"]["b"][0] += 1
    return m.body(x)


def counter(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.body(x) * m.calls


def counter_by_setattr(m: Any, x: Tensor) -> Tensor:
    setattr(m, "calls", m.calls + 1)  # noqa: B010
    return m.body(x) * m.calls


def counter_by_dict(m: Any, x: Tensor) -> Tensor:
    m.__dict__["calls"] += 1
    return m.body(x) * m.calls


def meter(m: Any, x: Tensor) -> Tensor:
    m.meter.update(1)
    return m.body(x) * m.meter.count


def buffer_added_to(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.body(x) * m.count


def buffer_method(m: Any, x: Tensor) -> Tensor:
    m.count.add_(1)
    return m.body(x) * m.count


def tensor_attribute(m: Any, x: Tensor) -> Tensor:
    m.tensor += 1
    return m.body(x) * m.tensor


def tensor_read(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * (2.0 if m.tensor.item() > 0 else 1.0)


def child_attribute(m: Any, x: Tensor) -> Tensor:
    m.relu.calls = getattr(m.relu, "calls", 0) + 1
    return m.body(x) * m.relu.calls


def new_buffer(m: Any, x: Tensor) -> Tensor:
    m.register_buffer("made", torch.ones(1))
    return m.body(x) * m.made


def global_list(m: Any, x: Tensor) -> Tensor:
    LOG.append("called")
    return m.body(x)


def global_dict(m: Any, x: Tensor) -> Tensor:
    COUNTS["calls"] += 1
    return m.body(x) * COUNTS["calls"]


def global_number(m: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return m.body(x) * CALLS


def class_list(m: Any, x: Tensor) -> Tensor:
    Layers.kept_by_class.append("called")
    return m.body(x)


def class_list_by_self(m: Any, x: Tensor) -> Tensor:
    m.kept_by_class.append("called")
    return m.body(x)


def class_number(m: Any, x: Tensor) -> Tensor:
    Layers.calls_of_class += 1
    return m.body(x) * Layers.calls_of_class


def default_argument(m: Any, x: Tensor, kept: Any = []) -> Tensor:  # noqa: B006
    kept.append("called")
    return m.body(x) * len(kept)


def iterator(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * next(m.iterator)


def python_random(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * random.random()


def own_random(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * m.rng.random()


def numpy_random(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * float(np.random.rand())


def numpy_generator(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * float(m.numpy_rng.random())


def torch_random(m: Any, x: Tensor) -> Tensor:
    return m.body(x) * torch.rand(1)


def torch_generator(m: Any, x: Tensor) -> Tensor:
    return m.body(x) + torch.randn(1, generator=m.generator)


def random_like(m: Any, x: Tensor) -> Tensor:
    return m.body(x) + torch.randn_like(x)


def dropout_always(m: Any, x: Tensor) -> Tensor:
    return F.dropout(m.body(x), 0.5, True)


def noise_when_asked(m: Any, x: Tensor) -> Tensor:
    y = m.body(x)
    return y + torch.randn_like(y) * m.noise_std if m.noise_std else y


def inner_function(m: Any, x: Tensor) -> Tensor:
    total = 0

    def add(y: Tensor) -> Tensor:
        nonlocal total
        total += 1
        return y * total

    return add(add(m.body(x)))


FORWARDS = [
    own_list, list_by_index, own_dict, own_set, own_queue, nested, counter, counter_by_setattr,
    counter_by_dict, meter, buffer_added_to, buffer_method, tensor_attribute, tensor_read,
    child_attribute, new_buffer, global_list, global_dict, global_number, class_list,
    class_list_by_self, class_number, default_argument, iterator, python_random, own_random,
    numpy_random, numpy_generator, torch_random, torch_generator, random_like, dropout_always,
    noise_when_asked, inner_function,
]  # fmt: skip


def seed() -> None:
    """Sets all generators that the forwards draw from, but for models' own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def shared_state() -> list[Any]:
    """What forwards keep in this module and in the class, apart from their model."""
    of_class = list(Layers.kept_by_class), Layers.calls_of_class
    return [list(LOG), dict(COUNTS), CALLS, *of_class]


def reset() -> None:
    """Empties what forwards keep apart from their model."""
    global CALLS
    LOG.clear(), COUNTS.update(calls=0), Layers.kept_by_class.clear()
    CALLS = Layers.calls_of_class = 0
    default_argument.__defaults__[0].clear()  # type: ignore[index]


def own_state(m: Any) -> list[Any]:
    """What forwards keep, of plain values; tensors as their shapes, symbols as what they are."""
    names = ("kept", "cache", "seen", "queue", "nested", "calls", "tensor", "count")
    held = [getattr(m, name) for name in names] + [m.meter.values, m.meter.count]
    held.append(vars(m.relu).get("calls"))
    return [_plain(value) for value in held] + [sorted(m._buffers), m.rng.getstate()]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.sum().item()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | deque) else repr(value)
