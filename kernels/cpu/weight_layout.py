"""Weights laid out as the native steps read them (conv_direct.h, conv3x3_winograd.h and
conv_grouped.h say how)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.cpu.program import lanes, nr

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015: F(2, 3)
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def direct_weights(w: Tensor, groups: int = 1) -> Tensor:
    """[K, C / groups, R, S] -> for each group, and panel of channels in it, [R, S, C, panel]."""
    return torch.cat(
        [
            part.permute(2, 3, 1, 0).reshape(-1)
            for group in w.chunk(groups)
            for part in _to_lanes(group).split(nr())
        ]
    )


def direct_from(laid_out: Tensor, shape: torch.Size) -> Tensor:
    """The weight [K, C, R, S] that direct_weights laid out, for K of whole vectors."""
    k, c, r, s = shape
    sizes = [c * r * s * min(nr(), k - first) for first in range(0, k, nr())]
    parts = [part.view(r, s, c, -1) for part in laid_out.split(sizes)]
    return torch.cat(parts, -1).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def winograd_weights(w: Tensor) -> Tensor:
    """[K, C, 3, 3] -> for each panel of channels [16, C, panel] of G w G^T, computed in fp64."""
    g = torch.tensor(_G, dtype=torch.float64, device=w.device)
    u = torch.einsum("ir,kcrs,js->ijck", g, w.double(), g).float().flatten(0, 1)
    return torch.cat([part.reshape(-1) for part in _to_lanes(u, -1).split(nr(), -1)])


def grouped_weights(w: Tensor) -> Tensor:
    """[K, C / groups, R, S] -> for each vector of channels [R, S, i, lanes]: what lane l multiplies
    with input channel l ^ i of all."""
    by_lane = w[_shuffled(w.shape, w.device)]
    by_vector: Tensor = by_lane.unflatten(0, (-1, lanes()))
    return by_vector.permute(0, 3, 4, 2, 1).reshape(-1)


def grouped_from(laid_out: Tensor, shape: torch.Size) -> Tensor:
    """The weight [K, C / groups, R, S] that grouped_weights laid out."""
    _, of_each, r, s = shape
    by_lane = laid_out.view(-1, r, s, of_each, lanes()).permute(0, 4, 3, 1, 2).flatten(0, 1)
    weight = by_lane[_shuffled(shape, laid_out.device)]  # which undoes itself
    return weight.contiguous(memory_format=torch.channels_last)


def _shuffled(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of w[k, k ^ i]."""
    k, i = (torch.arange(size, dtype=torch.int64, device=device) for size in shape[:2])
    k = k[:, None]
    return k, (k % len(i)) ^ i


def per_channel(v: Tensor) -> Tensor:
    """[K] -> zeros up to a whole number of vectors."""
    return _to_lanes(v.float()).contiguous()


def _to_lanes(t: Tensor, dim: int = 0) -> Tensor:
    """Zeros after the channels, up to a whole number of vectors."""
    missing = -t.shape[dim] % lanes()
    after = [0, missing] if dim == -1 else [0, 0] * (t.dim() - 1) + [0, missing]
    return F.pad(t, after) if missing else t


def slopes(slope: Tensor | float, channels: int) -> Tensor:
    """A slope for each channel, from those, from one in a tensor, or from a number."""
    if not isinstance(slope, Tensor):
        slope = torch.tensor(slope, dtype=torch.float32, device="cpu")
    return per_channel(slope.reshape(-1).expand(channels))
