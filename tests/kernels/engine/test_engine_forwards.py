"""The engine on forwards of every shape, and norms that a forward spells out."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from engine_models import AS_FUSED, conv, images, made, require_answers
from graphs import error
from resfuse.kernels import build_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Conv
from scope import Scope

pytestmark = pytest.mark.slow


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    "pools that round up": lambda: nn.Sequential(
        conv(), nn.MaxPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    ),
    "average pools": lambda: nn.Sequential(
        conv(), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.AdaptiveAvgPool2d((3, 1)), nn.AvgPool2d((2, 1), 1, divisor_override=3),
    ),
    "adaptive pools of uneven windows": lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d(4)),
    "frozen norms with another eps": lambda: nn.Sequential(
        conv(), FrozenBatchNorm2d(16, eps=0.1), nn.ReLU(), conv(16), FrozenBatchNorm2d(16, eps=0.0)
    ),
    "a frozen norm alone": lambda: FrozenBatchNorm2d(3),
    "a gate and a sum": lambda: Scope(
        lambda s, x: (s.c(x) * s.c(x).mean((2, 3), keepdim=True).sigmoid() + s.d(x)).relu(),
        c=conv(), d=conv(),
    ),
    "a gate of one image for all": lambda: Scope(
        lambda s, x: s.c(x) * s.c(x).mean((0, 2, 3), keepdim=True), c=conv()
    ),
    "a map times itself": lambda: Scope(lambda s, x: (lambda y: y * y)(s.c(x)), c=conv()),
    "gates of gates": lambda: Scope(
        lambda s, x: (lambda g: g * g.sigmoid())(s.c(x).mean((2, 3), keepdim=True)), c=conv()
    ),
    "a shortcut without parameters": lambda: Scope(
        lambda s, x: (s.d(s.c(x)) + F.pad(s.c(x)[:, :, ::2, ::2], [0] * 5 + [5])).relu(),
        c=conv(), d=nn.Conv2d(16, 21, 3, 2, 1),
    ),
    "crops": lambda: Scope(
        lambda s, x: (s.c(x)[:, :, 1:-2, 3:], s.c(x)[..., 4:5], s.c(x)[1:, 2:, :, -3:]), c=conv()
    ),
    "pads that are no zeros behind": lambda: Scope(
        lambda s, x: [
            F.pad(s.c(x), (1, 0)), F.pad(s.c(x), [0] * 4 + [2, 1]), F.pad(s.c(x), [0] * 5 + [-3]),
            F.pad(s.c(x), [0] * 5 + [3], value=1.0),
        ],
        c=conv(),
    ),
    "nearest upsampling": lambda: nn.Sequential(
        conv(), nn.Upsample(scale_factor=2), conv(16), nn.Upsample(size=(25, 11)),
        nn.Upsample(scale_factor=(0.7, 1.3)),
    ),
    "a constant": lambda: Scope(lambda s, x: s.c(x) + torch.arange(x.shape[3]).float(), c=conv()),
    "a check of the dtype": lambda: Scope(lambda s, x: s.c(x.to(torch.float32)), c=conv()),
    "bfloat16 inside": lambda: Scope(
        lambda s, x: torch.max_pool2d(s.c(x).to(torch.bfloat16), 2), c=conv()
    ),
    "halves, swapped": lambda: Scope(
        lambda s, x: torch.cat(s.c(x).chunk(2, 1)[::-1], 1), c=conv()
    ),
    "the second half only": lambda: Scope(lambda s, x: s.c(x).chunk(2, 1)[1].relu(), c=conv()),
    "one weight under two norms": lambda: Scope(
        lambda s, x: (s.a(s.c(x)), s.b(s.c(x))),
        c=conv(), a=nn.BatchNorm2d(16), b=nn.BatchNorm2d(16),
    ),
    "a norm plus a convolution": lambda: Scope(
        lambda s, x: s.c(x) + s.b(s.p(x)),
        c=conv(3, 3), b=nn.BatchNorm2d(3), p=nn.MaxPool2d(3, 1, 1),
    ),
    "a view of the input, added": lambda: Scope(
        lambda s, x: s.c(x) + x.view_as(x), c=conv(3, 3)
    ),
    "a map twice": lambda: Scope(lambda s, x: (lambda y: y + y)(s.c(x)), c=conv()),
    "one output twice": lambda: Scope(lambda s, x: [s.c(x)] * 2, c=conv()),
    "the input among the outputs": lambda: Scope(lambda s, x: (x, s.c(x)), c=conv()),
    "a nested dict": lambda: Scope(
        lambda s, x: OrderedDict(out=s.c(x), more={"aux": [s.c(x).relu()]}), c=conv()
    ),
    "a number": lambda: Scope(lambda s, x: s.c(x).mean(), c=conv()),
    "nothing": nn.Identity,
    "a pool only": lambda: nn.MaxPool2d(2),
    "layers without maps": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 9 * 8, 20), nn.BatchNorm1d(20), nn.PReLU(20), nn.Linear(20, 5)
    ),
    "in place": lambda: nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Dropout(inplace=True)),
    "a transposed convolution": lambda: nn.Sequential(conv(), nn.ConvTranspose2d(16, 8, 2, 2)),
    "a flattened map": lambda: nn.Sequential(
        conv(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 8)
    ),
    "a flattened map, changed": lambda: nn.Sequential(
        conv(), nn.Flatten(), nn.ReLU(), nn.Linear(16 * 9 * 8, 8)
    ),
    "shuffled channels": lambda: nn.Sequential(conv(), nn.ChannelShuffle(4), conv(16)),
    "padding that is no zeros": lambda: nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"),
}  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_of_every_shape(
    name: str, memory_format: torch.memory_format, timings: Path
) -> None:
    model, x = (
        each.to(memory_format=memory_format) for each in (made(FORWARDS[name]), images(2, 3, 9, 8))
    )
    before = x.clone()
    engine = build_engine(model, x, timings=timings)
    with torch.no_grad():
        want = model(x.clone())
    got = engine(x)
    assert torch.equal(x, before)
    assert type(got) is type(want)
    for y, plain in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert y.shape == plain.shape and y.dtype == plain.dtype
        assert error(y, plain) < AS_FUSED
    assert "samples/s" in engine.explain() or name == "nothing"


def test_a_frozen_norm_is_folded_with_its_own_eps() -> None:
    """By torchvision's forward, and as detectron2 writes the same."""

    def by_detectron2(s: Any, x: Tensor) -> Tensor:
        x, n = s.c(x), s.n
        scale = n.weight * (n.running_var + 1e-3).rsqrt()
        bias = n.bias - n.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)

    forwards = (lambda s, x: s.n(s.c(x)), by_detectron2)
    for forward, eps in zip(forwards, (0.1, 1e-3), strict=True):
        graph, _ = capture(
            made(lambda f=forward: Scope(f, c=conv(), n=FrozenBatchNorm2d(16, eps=0.1))),
            images(2, 3, 9, 8),
        )
        (node,) = graph.nodes
        assert isinstance(node.op, Conv) and node.op.norm is not None
        assert node.op.norm.eps == eps
        assert (node.op.norm.mean, node.op.norm.var) == ("n.running_mean", "n.running_var")
        assert (node.op.norm.weight, node.op.norm.bias) == ("n.weight", "n.bias")


def test_what_only_looks_like_a_norm_is_computed_as_it_is(timings: Path) -> None:
    """The mean is scaled by something else."""

    def forward(s: Any, x: Tensor) -> Tensor:
        scale = (s.n.weight * (s.n.running_var + 1e-3).rsqrt()).view(1, -1, 1, 1)
        other = s.n.weight.view(1, -1, 1, 1)
        shift = s.n.bias.view(1, -1, 1, 1) - s.n.running_mean.view(1, -1, 1, 1) * other
        return s.c(x) * scale + shift

    model = made(lambda: Scope(forward, c=conv(), n=FrozenBatchNorm2d(16)))
    graph, _ = capture(model, images(2, 3, 9, 8))
    norms = [n.op.norm for n in graph.nodes if isinstance(n.op, Conv) and n.op.norm]
    assert [norm.mean for norm in norms] == [None]  # a scale alone
    require_answers(build_engine(model, images(2, 3, 9, 8), timings=timings), model,
                    images(2, 3, 9, 8))  # fmt: skip
