"""Random modules made of the habits people have, fused, run, changed, and run again: what a fused
one answers, raises, or leaves behind is what a plain one does."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hostile import images, outcome, require_same, spread
from resfuse.kernels import explain, fuse
from resfuse.kernels.engine.engine import build_engine

CHANNELS = 4
FLAGS = {"on": True}
LINES = {  # of a forward: y is the running value, x the argument, k the line's number
    "conv": "y = self.conv{k}(y)",
    "norm": "y = self.bn{k}(y)",
    "chain": "y = self.relu{k}(self.bn{k}(self.conv{k}(y)))",
    "sum": "y = y + x",
    "sum in place": "y += x",
    "input in place": "x *= 0.5",
    "relu": "y = self.relu{k}(y)",
    "relu function": "y = F.relu(y)",
    "relu in place": "y = F.relu(y, inplace=True)",
    "method in place": "y = y.mul_(1.5)",
    "late norm": "z = self.conv{k}(y); y = self.gate{k}(y); y = self.bn{k}(z) + y",
    "gate": "y = self.gate{k}(y)",
    "shared": "y = self.shared(y)",
    "sequence": "y = self.sequence{k}(y)",
    "block": "y = self.block{k}(y)",
    "blocks": "y = self.blocks{k}(y)",
    "flag": "y = y * 2 if self.flag else y.tanh()",
    "flag of a global": "y = y * 2 if FLAGS['on'] else y - 1",
    "number": "y = y * self.number",
    "object": "y = y * self.config.gain",
    "table": "y = y * self.table['gain']",
    "list": "self.kept.append(y.mean())",
    "dict": "self.cache['y'] = y.mean()",
    "counter": "self.calls += 1; y = y * self.calls",
    "buffer": "self.count += 1",
    "tensor": "y = y * self.tensor",
    "is tensor": "y = y * (2 if isinstance(x, torch.Tensor) else 3)",
    "is tuple": "y = y * (2 if isinstance(y, (tuple, list, dict)) else 1)",
    "has": "y = y * (2 if hasattr(x, 'mask') else 1)",
    "value": "y = y if y.sum() > 0 else y * 2",
    "size": "y = y.flatten(2).reshape(y.shape)",
    "dropout": "y = F.dropout(y, 0.5, self.training)",
    "drop path": "y = self.path{k}(y)",
    "view": "y = torch.cat([y[:, :2], y[:, 2:]], 1)",
    "view in place": "y[:, :1].mul_(2)",
    "skip": "x = y",
    "try": "try:\n        y = y['image']\n    except (IndexError, TypeError): pass",
    "is none": "y = y if self.optional is None else self.optional(y)",
    "every block": "for block in self.many:\n        y = block(y)",
    "inner function": "add = lambda z: z + x; y = add(y)",
    "class number": "y = y * self.gain_of_class",
}  # fmt: skip


class Gate(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.fc, self.in_place = nn.Linear(CHANNELS, CHANNELS), in_place

    def forward(self, x: Tensor) -> Tensor:
        g = self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]
        if self.in_place:
            x *= g
            return x
        return x * g


class DropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale == 1.0 else x * self.scale


class Block(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.relu, self.residual = nn.ReLU(in_place), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.relu(y + x if self.residual else y)


class Config:
    def __init__(self) -> None:
        self.gain = 1.0


class Base(nn.Module):
    gain_of_class = 1.0

    def __init__(self, count: int, in_place: bool) -> None:
        super().__init__()
        for k in range(count):
            setattr(self, f"conv{k}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=k % 2 == 0))
            setattr(self, f"bn{k}", nn.BatchNorm2d(CHANNELS))
            setattr(self, f"relu{k}", nn.ReLU(in_place))
            setattr(self, f"gate{k}", Gate(in_place))
            setattr(self, f"path{k}", DropPath())
            setattr(self, f"block{k}", Block(in_place))
            blocks = [Block(in_place), Block(not in_place)]
            setattr(self, f"blocks{k}", nn.Sequential(*blocks))
            parts = {"c": nn.Conv2d(CHANNELS, CHANNELS, 1), "b": nn.BatchNorm2d(CHANNELS)}
            setattr(self, f"sequence{k}", nn.Sequential(OrderedDict(parts, a=nn.ReLU(in_place))))
        self.shared = Block(False)
        self.many = nn.ModuleList([Block(in_place)])
        self.flag, self.number, self.optional = True, 1.0, None
        self.config, self.table, self.kept = Config(), {"gain": 1.0}, []
        self.cache: dict[str, Any] = {}
        self.calls, self.tensor = 0, torch.ones(1) * 1.5
        self.register_buffer("count", torch.zeros(1))


def a_hook(m: nn.Module, args: Any, y: Any) -> Any:
    return y * 1.5 if isinstance(y, Tensor) else None


def stepped(model: nn.Module) -> None:
    """A step that torch does not count."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step()


def written_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.conv0.weight.mul_(2)


CHANGES: dict[str, Any] = {
    "flag": lambda m: setattr(m, "flag", False),
    "number": lambda m: setattr(m, "number", 2.5),
    "object": lambda m: setattr(m.config, "gain", 0.5),
    "table": lambda m: m.table.update(gain=1.5),
    "optional": lambda m: setattr(m, "optional", nn.Tanh()),
    "eps": lambda m: setattr(m.bn0, "eps", 0.3),
    "stride": lambda m: setattr(m.conv0, "stride", (2, 2)),
    "padding": lambda m: setattr(m.conv0, "padding_mode", "reflect"),
    "relu": lambda m: setattr(m, "relu0", nn.Sigmoid()),
    "norm": lambda m: setattr(m, "bn0", nn.Identity()),
    "gate": lambda m: setattr(m.gate0, "in_place", not m.gate0.in_place),
    "path": lambda m: setattr(m.path0, "scale", 0.5),
    "residual": lambda m: setattr(m.block0, "residual", False),
    "inner residual": lambda m: setattr(m.blocks0[1], "residual", False),
    "sequence": lambda m: m.sequence0.append(nn.Tanh()),
    "shorter": lambda m: m.blocks0.pop(0),
    "more": lambda m: m.many.append(Block(True).eval()),
    "hook": lambda m: m.bn0.register_forward_hook(a_hook),
    "inner hook": lambda m: m.blocks0[0].register_forward_hook(a_hook),
    "weight": lambda m: m.conv0.weight.data.mul_(2),
    "statistics": lambda m: m.bn0.running_mean.add_(0.5),
    "tensor": lambda m: setattr(m, "tensor", torch.ones(1) * 3),
    "training norm": lambda m: m.bn0.train(),
    "class": lambda m: setattr(type(m), "gain_of_class", 3.0),
    "own method": lambda m: setattr(m.relu0, "forward", torch.tanh),
    "global": lambda m: FLAGS.update(on=not FLAGS["on"]),
    "optimizer": lambda m: stepped(m),
    "written in inference mode": lambda m: written_in_inference_mode(m),
    "numpy": lambda m: m.conv0.weight.detach().numpy().__imul__(1.5),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "a weight in channels last": lambda m: m.conv0.to(memory_format=torch.channels_last),
    "copy": lambda m: None,
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[type[nn.Module], int, bool, str, list[str]]:
    """A class with a random forward, its source, and what is changed later."""
    lines = draw(st.lists(st.sampled_from(sorted(LINES)), min_size=1, max_size=5))
    lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(["chain", "late norm"])))
    returned = draw(st.sampled_from(["y"] * 4 + ["(y, x)", "{'y': y}", "[y, y + 1]"]))
    takes = draw(st.sampled_from(["y = x"] * 4 + ["y = x = x['image'] if 'image' in x else x"]))
    body = [takes, *(LINES[line].replace("{k}", str(k)) for k, line in enumerate(lines))]
    source = "def forward(self, x):\n    " + "\n    ".join([*body, f"return {returned}"])
    space: dict[str, Any] = globals()
    scope: dict[str, Any] = {}
    exec(compile(source, "<habits>", "exec"), space, scope)
    changes = draw(st.lists(st.sampled_from(sorted(CHANGES)), max_size=2))
    kind = type("Habits", (Base,), {"forward": scope["forward"]})
    return kind, len(lines), draw(st.booleans()), source, changes


def strides_of(answer: Any) -> list[tuple[int, ...]]:
    return [leaf.stride() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]


def state_of(m: Any) -> list[Any]:
    return [m.kept, m.cache, m.calls, m.count, m.tensor, m.number, m.flag]


@settings(
    max_examples=120, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(cases())
def test_habits(case: Any) -> None:
    run(case)


def run(case: Any) -> None:
    kind, count, in_place, source, changes = case
    FLAGS["on"] = True
    torch.manual_seed(0)
    plain = spread(kind(count, in_place))
    before = copy.deepcopy(state_of(plain))
    fused = fuse(plain)
    explain(plain)
    require_same(state_of(plain), before)
    try:
        answer_alike(plain, fused)
        for change in changes:
            if change == "copy":
                fused = copy.deepcopy(fused)
            elif change == "global":
                CHANGES[change](None)
            else:
                torch.manual_seed(1)
                raised = [_raises(CHANGES[change], model) for model in (plain, fused)]
                assert raised[0] == raised[1]
            answer_alike(plain, fused)
    except AssertionError as error:
        raise AssertionError(f"{source}\n{changes} {in_place=}\n{error}") from error


def _raises(change: Any, model: nn.Module) -> str | None:
    torch.manual_seed(1)
    try:
        change(model)
    except Exception as error:
        return type(error).__name__
    return None


def answer_alike(plain: nn.Module, fused: nn.Module) -> None:
    shapes = ((2, CHANNELS, 5, 6), (1, CHANNELS, 4, 4))
    inputs = [*(images(1, shape) for shape in shapes), {"image": images(2, shapes[0])}]
    inputs.append(images(3, shapes[0]).contiguous(memory_format=torch.channels_last))
    for x in inputs:
        for _ in range(2):
            given, too = copy.deepcopy(x), copy.deepcopy(x)
            want, got = outcome(plain, given), outcome(fused, too)
            require_same(got, want)
            assert strides_of(got) == strides_of(want)
            require_same(too, given)
            if isinstance(want, str):  # what was written before an error is nobody's promise
                return
        require_same(state_of(fused), state_of(plain))


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture,
    ],
)  # fmt: skip
@pytest.mark.usefixtures("own_cache")
@given(cases())
def test_engines_of_habits(case: Any) -> None:
    """An engine answers as the model did when it was built, or is refused; later changes to the
    model change nothing."""
    run_engine(case)


def run_engine(case: Any) -> bool:
    """Whether there was an engine."""
    kind, count, in_place, source, changes = case
    FLAGS["on"] = True
    torch.manual_seed(0)
    model = spread(kind(count, in_place))
    shape, before = (2, CHANNELS, 5, 6), copy.deepcopy(state_of(model))
    plain = copy.deepcopy(model)
    try:
        engine = build_engine(model, images(1, shape))
    except ValueError:
        return False
    try:
        require_same(state_of(model), before)
        inputs = [images(1, shape), images(2, shape), images(2, shape)]
        inputs.append(images(3, shape).contiguous(memory_format=torch.channels_last))
        for round_ in range(2):
            for x in inputs:
                given = x.clone()
                require_same(outcome(engine, given), outcome(plain, x.clone()))
                torch.testing.assert_close(given, x, rtol=0, atol=0)
            for change in changes if not round_ else ():
                if change not in ("copy", "global", "class"):
                    _raises(CHANGES[change], model)
    except AssertionError as error:
        raise AssertionError(f"{source}\n{changes} {in_place=}\n{error}") from error
    return True


assert F is not None  # the forwards' sources read it
