"""Networks in int8 as an engine on a GPU computes them, candidates for them, and what every answer
must equal bit for bit: the same graph on values in uint8, by the plain-torch twins.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernel_inputs import DEVICE
from resfuse.kernels import calibrate
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    Graph,
    State,
)
from resfuse.kernels.engine.quantization.quantized_graph import quantized
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.gpu import triton_int8, triton_int8_maps


def images(n: int, channels: int = 3, size: int = 12, seed: int = 0) -> Tensor:
    """Smooth, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, channels, 4, 4, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bicubic")


class Block(nn.Module):
    """A bottleneck with a projection: 1x1, 3x3/2, 1x1, added behind them, ReLU."""

    def __init__(self, c: int, k: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(c, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, k, 1, bias=False), nn.BatchNorm2d(k),
        )  # fmt: skip
        self.side = nn.Conv2d(c, k, 1, stride) if stride > 1 or c != k else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.side(x))


def small_resnet() -> nn.Module:
    """A stem, a max-pool, a block that halves the map and one that does not, and a head."""
    stem = nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return nn.Sequential(*stem, Block(16, 32, 2), Block(32, 32), *head)


class Mixed(nn.Module):
    """What a ResNet has none of: groups, dilation, depthwise, PReLU, a sum behind an activation,
    concatenations, picked channels and pixels, average pools, a norm of its own, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 32, 3, 1, 1), nn.PReLU(32)
        self.groups = nn.Conv2d(32, 32, 3, 1, 2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.norm = nn.BatchNorm2d(64)
        self.odd = nn.Conv2d(64, 24, (1, 3), padding=(0, 1))
        self.gate = nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.slope(self.first(x))
        y = F.relu(self.groups(y)) + y
        z = torch.cat([F.leaky_relu(self.depthwise(y), 0.1), y], 1)
        z = F.relu(self.norm(F.channel_shuffle(z, 2)))
        z = F.avg_pool2d(self.odd(z), 3, 2, 1, count_include_pad=False)
        z = z * F.relu(self.gate(z.mean((2, 3), keepdim=True)))
        return F.interpolate(z, scale_factor=2), z.mean((2, 3))


Quantised = tuple[Graph, Graph, State]  # on a GPU, on a CPU, and the state of both


def quantised(model: nn.Module, x: Tensor, kept: Sequence[str] = ()) -> Quantised:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(images(16, x.shape[1], x.shape[2], seed=5))
    ranges = calibrate(model.eval(), images(8, x.shape[1], x.shape[2], seed=6))
    graph, state = capture(model, x)
    on_gpu, corrections = quantized(graph, state, ranges, kept, torch.int8)
    on_cpu, _ = quantized(graph, state, ranges, kept)
    return on_gpu, on_cpu, {**state, **corrections}


def moved(state: State) -> State:
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def chosen(graph: Graph, which: int = -1) -> list[Candidate]:
    """A candidate of the tactics in int8 for each node that has one, else torch's."""
    found = []
    for at in range(len(graph.nodes)):
        ours = [*triton_int8.segments(graph, at), *triton_int8_maps.segments(graph, at)]
        found.append(ours[which] if ours else Candidate("eager", at, at + 1))
    return found


@torch.inference_mode()
def require_its_twin(
    made: Quantised, candidates: Sequence[Candidate], x: Tensor, formats: int = 2
) -> None:
    """Fails unless candidates answer as the graph on uint8 does by its twins; in both memory
    formats, or the first of them."""
    on_gpu, on_cpu, state = made
    run, want = Executor(on_gpu, candidates, moved(state)), eager.exact(on_cpu, state, [x])
    for given in (x, x.contiguous(memory_format=torch.channels_last))[:formats]:
        for y, exact in zip(run(given.to(DEVICE)), want, strict=True):
            assert torch.equal(y.cpu().double(), exact.double())
