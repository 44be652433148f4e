"""Modules with forwards as people write them, of lines put together at random.

A line is text: y is the running value, x the argument, {k} the line's number, so that
`self.conv{k}` is a layer of that line's own.
"""

import random
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: F401 - the lines read it
from torch import Tensor, nn

CHANNELS = 16  # as many as our own convolutions take
FLAGS = {"on": True}
LINES = {
    "conv": "y = self.conv{k}(y)",
    "norm": "y = self.bn{k}(y)",
    "chain": "y = self.relu{k}(self.bn{k}(self.conv{k}(y)))",
    "two chains": "y = self.bn{k}(self.conv{k}(y)) + self.block{k}(y)",
    "sum": "y = y + x",
    "sum in place": "y += x",
    "input in place": "x *= 0.5",
    "relu": "y = self.relu{k}(y)",
    "relu function": "y = F.relu(y)",
    "relu in place": "y = F.relu(y, inplace=True)",
    "method in place": "y = y.mul_(1.5)",
    "operator in place": "y = torch.clamp_(y, -2, 3)",
    "out": "y = torch.add(y, 1, out=torch.empty_like(y))",
    "set item": "y[:, 0] = 0.5",
    "late norm": "z = self.conv{k}(y); y = self.gate{k}(y); y = self.bn{k}(z) + y",
    "gate": "y = self.gate{k}(y)",
    "shared": "y = self.shared(y)",
    "shared twice": "y = self.shared(self.shared(y))",
    "sequence": "y = self.sequence{k}(y)",
    "block": "y = self.block{k}(y)",
    "block by its forward": "y = self.block{k}.forward(y)",
    "blocks": "y = self.blocks{k}(y)",
    "first of the blocks": "y = self.blocks{k}[0](y)",
    "by its name": "y = getattr(self, 'block{k}')(y)",
    "flag": "y = y * 2 if self.flag else y.tanh()",
    "flag of a global": "y = y * 2 if FLAGS['on'] else y - 1",
    "number": "y = y * self.number",
    "object": "y = y * self.config.gain",
    "table": "y = y * self.table['gain']",
    "own method": "y = self.scaled(y)",
    "property": "y = y * self.gain",
    "class number": "y = y * self.gain_of_class",
    "list": "self.kept.append(y.mean())",
    "dict": "self.cache['y'] = y.mean()",
    "attribute": "self.last = y",
    "counter": "self.calls += 1; y = y * self.calls",
    "buffer": "self.count += 1",
    "written buffer": "self.count.copy_(y.mean()); y = y + self.count",
    "tensor": "y = y * self.tensor",
    "weight": "y = y + self.conv{k}.weight.mean()",
    "functional conv": "c = self.conv{k}; y = F.conv2d(y, c.weight, None, 1, 'same', 1, c.groups)",
    "is tensor": "y = y * (2 if isinstance(x, torch.Tensor) else 3)",
    "is tuple": "y = y * (2 if isinstance(y, (tuple, list, dict)) else 1)",
    "type": "y = y * (2 if type(y) is torch.Tensor else 3)",
    "has": "y = y * (2 if hasattr(x, 'mask') else 1)",
    "dtype": "y = y * (2 if y.dtype == torch.float32 else 3)",
    "wants gradients": "y = y * (2 if y.requires_grad else 3)",
    "gradients on": "y = y * (2 if torch.is_grad_enabled() else 3)",
    "value": "y = y if y.sum() > 0 else y * 2",
    "while": "while 30 < y.abs().max() < float('inf'): y = y * 0.5",
    "shape": "y = y * 2 if y.shape[-1] > 5 else y + 1",
    "batch": "for _ in range(len(y)): y = y * 0.9",
    "images": "y = torch.stack([image * 2 for image in y])",
    "assert": "assert x.shape[0] < 3",
    "unpacked": "n, c, h, w = y.shape; y = y.reshape(n, c, h * w).reshape(n, c, h, w)",
    "size": "y = y.flatten(2).reshape(y.shape)",
    "view": "y = y.view(y.size(0), -1).view(y.shape)",
    "strided": "y = y.as_strided(y.shape, y.stride())",
    "stride": "y = y * y.stride(1)",
    "contiguous": "y = y * (2 if y.is_contiguous() else 3)",
    "half of it": "y = torch.cat([y[:, :2], y[:, 2:]], 1)",
    "chunks": "a, b = y.chunk(2, 1); y = torch.cat([b, a], 1)",
    "transposed": "y = y.transpose(2, 3); y = self.conv{k}(y).transpose(2, 3)",
    "view in place": "y[:, :1].mul_(2)",
    "later in place": "z = y[:, 1:]; z += 1",
    "dropout": "y = F.dropout(y, 0.5, self.training)",
    "noise": "y = y + torch.rand(1)",
    "drop path": "y = self.path{k}(y)",
    "skip": "x = y",
    "try": "try:\n        y = y['image']\n    except (IndexError, TypeError): pass",
    "is none": "y = y if self.optional is None else self.optional(y)",
    "every block": "for block in self.many:\n        y = block(y)",
    "inner function": "add = lambda z: z + x; y = add(y)",
    "zeros": "y = y + torch.zeros(y.shape)",
    "to double and back": "y = y.double().to(x.dtype)",
    "without gradients": "with torch.no_grad():\n        y = self.block{k}(y)",
    "without autocast": "with torch.autocast('cpu', enabled=False):\n        y = self.conv{k}(y)",
    "detached": "y = y.detach()",
    "pool": "y = F.max_pool2d(self.conv{k}(y), 3, 1, 1)",
    "resized": "y = F.interpolate(self.conv{k}(y), scale_factor=2.0)[..., ::2, ::2]",
}  # fmt: skip
NO_GRAPH = frozenset(  # lines with which a forward is no matter of a graph; its layers' may be
    {
        "set item", "list", "dict", "attribute", "counter", "buffer", "type", "dtype",
        "wants gradients", "gradients on", "value", "while", "shape", "batch", "images", "assert",
        "contiguous", "noise", "try", "zeros", "without gradients", "without autocast",
    }
)  # fmt: skip
RETURNED = ["y"] * 5 + ["(y, x)", "{'y': y}", "[y, y + 1]", "(y, y[:, :2])", "y.mean((2, 3))"]
TAKEN = ["y = x"] * 5 + ["y = x = x['image'] if 'image' in x else x", "x = x + 0; y = x"]


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


def conv(k: int, in_place: bool, draw: random.Random) -> nn.Module:
    options: list[dict[str, Any]] = [
        {"kernel_size": 3, "padding": 1}, {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "groups": CHANNELS},
        {"kernel_size": 3, "padding": 2, "dilation": 2}, {"kernel_size": (1, 3), "padding": "same"},
    ]  # fmt: skip
    options_of_one = options[draw.choice([0, 0, 0, 1, 2, 3, 4])]
    return nn.Conv2d(CHANNELS, CHANNELS, bias=k % 2 == 0, **options_of_one)


def norm(k: int, in_place: bool, draw: random.Random) -> nn.Module:
    options: dict[str, Any] = draw.choice([{}, {}, {}, {"affine": False}, {"momentum": None}])
    return nn.BatchNorm2d(CHANNELS, **options)


def activation(k: int, in_place: bool, draw: random.Random) -> nn.Module:
    kinds = [nn.ReLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish]
    return draw.choice(kinds)(inplace=in_place)


def sequence(k: int, in_place: bool, draw: random.Random) -> nn.Module:
    parts = {"c": nn.Conv2d(CHANNELS, CHANNELS, 1), "b": nn.BatchNorm2d(CHANNELS)}
    return nn.Sequential(OrderedDict(parts, a=nn.ReLU(in_place)))


LAYERS: dict[str, Callable[[int, bool, random.Random], nn.Module]] = {
    "conv": conv, "bn": norm, "relu": activation, "sequence": sequence,
    "gate": lambda k, in_place, draw: Gate(in_place),
    "path": lambda k, in_place, draw: DropPath(),
    "block": lambda k, in_place, draw: Block(in_place),
    "blocks": lambda k, in_place, draw: nn.Sequential(Block(in_place), Block(not in_place)),
}  # fmt: skip


class Base(nn.Module):
    """What the forwards read, and only those layers that one of them calls."""

    gain_of_class = 1.0

    def __init__(self, source: str, in_place: bool, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        for kind, k in re.findall(r"self\.(\w+?)(\d+)", source) + re.findall(
            r"'(block)(\d+)'", source
        ):
            if not hasattr(self, kind + k):
                setattr(self, kind + k, LAYERS[kind](int(k), in_place, draw))
        if "self.shared" in source:
            self.shared = Block(False)
        if "self.many" in source:
            self.many = nn.ModuleList([Block(in_place)])
        self.flag, self.number, self.optional = True, 1.0, None
        self.config, self.table, self.kept = Config(), {"gain": 1.0}, []
        self.cache: dict[str, Any] = {}
        self.calls, self.tensor, self.last = 0, torch.ones(1) * 1.5, None
        self.register_buffer("count", torch.zeros(1))

    @property
    def gain(self) -> float:
        return self.number + 1

    def scaled(self, y: Tensor) -> Tensor:
        return y * self.number if self.flag else y
