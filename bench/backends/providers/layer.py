"""What is timed: y = relu(conv(x) + b), with inputs and weights as they are inside a network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels.ops.conv_problem import ConvProblem


class ConvRelu(nn.Module):
    """x [N, C, H, W] -> y [N, K, P, Q]; every provider's starting point, and eager's own form."""

    def __init__(self, problem: ConvProblem) -> None:
        super().__init__()
        p = self.problem = problem
        self.conv = nn.Conv2d(p.c, p.k, (p.r, p.s), *p.geometry, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv(x))


def layer(problem: ConvProblem, device: str, seed: int) -> ConvRelu:
    """Returns the layer with seeded weights: He's initialisation, biases of a tenth."""
    generator = torch.Generator().manual_seed(seed)
    made = ConvRelu(problem).eval().requires_grad_(False)
    nn.init.kaiming_normal_(made.conv.weight, nonlinearity="relu", generator=generator)
    assert made.conv.bias is not None
    nn.init.normal_(made.conv.bias, std=0.1, generator=generator)
    return made.to(device, problem.dtype)


def inputs(problem: ConvProblem, device: str, count: int) -> list[Tensor]:
    """Batches [N, C, H, W], contiguous; half of the numbers are zeros, as after a ReLU."""
    shape = (problem.n, problem.c, problem.h, problem.w)
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        made.append(torch.randn(shape, generator=generator).relu_().to(device, problem.dtype))
    return made
