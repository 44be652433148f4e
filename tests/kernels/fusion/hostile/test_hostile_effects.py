"""Forwards that do more than compute: fuse and explain leave no trace of them, and runs do them."""

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile import images, is_fused, pair_of, require_alike, require_same, spread
from resfuse.kernels import explain, fuse

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


def _kind(forward: Any) -> Any:
    """A model with that forward."""
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
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def shared_state() -> list[Any]:
    kind = Layers
    return [list(LOG), dict(COUNTS), CALLS, list(kind.kept_by_class), kind.calls_of_class]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    reset()


def reset() -> None:
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


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_fuse_and_explain_leave_no_trace(forward: Any) -> None:
    model = spread(_kind(forward)())
    seed()
    dice = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    before = own_state(model), shared_state()
    fused = fuse(model)
    assert (own_state(model), shared_state()) == before
    explain(model)  # runs a copy once, to count: what all copies share may change
    assert own_state(model) == own_state(fused) == before[0]
    assert random.getstate() == dice[0] and np.random.get_state()[1].tolist() == dice[1]
    assert torch.equal(torch.get_rng_state(), dice[2])


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_runs_do_what_they_do(forward: Any) -> None:
    seed()
    plain = spread(_kind(forward)())
    fused = fuse(plain)
    results = []
    for model in (plain, fused):
        seed()
        with torch.no_grad():
            ys = [model(images(i)) for i in range(3)]
        results.append((ys, own_state(model), shared_state()))
        reset()
    require_same(results[1][0], results[0][0])
    _require_close(results[1][1:], results[0][1:])


def _require_close(got: Any, want: Any) -> None:
    if isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            _require_close(one, other)
    elif isinstance(want, dict):
        _require_close(list(got.items()), list(want.items()))
    else:
        assert got == want


def test_noise_that_is_switched_on_later() -> None:
    plain, fused = pair_of(_kind(noise_when_asked))
    assert is_fused(fused)
    for model in (plain, fused):
        model.noise_std = 1.0
    seed()
    with torch.no_grad():
        want = plain(images())
        seed()
        require_same(fused(images()), want)


# What is written in place between a layer and the one it would be fused with


class Gate(nn.Module):
    """Squeeze and excitation that scales its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x *= self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return x


class Unreadable(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() != 0 else x


class Pure(Gate):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.mean((2, 3)))
        y *= 2
        return x * F.relu(y, True)[:, :, None, None]


class Setter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x


class Out(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, 3, out=x)


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 1:].unsqueeze(0).mul_(2)
        return x


GATES: list[Any] = [
    Gate, Unreadable, Pure, Setter, Out, View, lambda: nn.ELU(inplace=True),
    lambda: nn.Sequential(nn.Sequential(nn.Hardtanh(inplace=True))), lambda: nn.Softplus(),
    lambda: nn.Threshold(0.1, 20.0, inplace=True),
]  # fmt: skip


def _input_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    gated = m.gate(x)
    return m.relu(m.bn(y) + gated)


def _residual_written(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x)) + x
    m.gate(x)
    return m.relu(y) + x


def _middle_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.gate(y)
    return m.relu(m.bn(y)) + z


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("forward", [_input_written, _residual_written, _middle_written])
def test_writes_in_place(forward: Any, gate: Any) -> None:
    def make() -> nn.Module:
        model = _kind(forward)()
        model.gate = gate()
        return model

    require_alike(*pair_of(make))


def test_a_pure_gate_does_not_break_a_chain() -> None:
    def make() -> nn.Module:
        model = _kind(_input_written)()
        model.gate = Pure()
        return model

    assert explain(pair_of(make)[1]).lines[0].how == "conv + bn + add + relu"


class ThroughAList(nn.Module):
    """Writes to a layer that it holds in a list, where torch does not see it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = [block]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block.scale += 0.5
        return x * 0.5


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) * self.scale)


def test_modules_found_in_lists_are_neither_changed_nor_baked_in() -> None:
    torch.manual_seed(0)
    block = Scaled()
    plain = nn.Sequential(ThroughAList(block), block, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    x = torch.randn(2, 3, 4, 4)
    copy = fuse(plain)
    assert copy[1].scale == 1.0
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(copy(x), plain(x))
    assert copy[1].scale == plain[1].scale == 2.5
