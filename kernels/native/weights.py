"""Weights laid out as the native steps read them (direct.h, winograd.h and grouped.h say how)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.native.step import lanes, panel

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015: F(2, 3)
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


def direct_weights(w: Tensor, groups: int = 1) -> Tensor:
    """[K, C / groups, R, S] -> for each group, and panel of channels in it, [R, S, C, panel]."""
    return torch.cat(
        [
            part.permute(2, 3, 1, 0).reshape(-1)
            for group in w.chunk(groups)
            for part in _to_lanes(group).split(panel())
        ]
    )


def winograd_weights(w: Tensor) -> Tensor:
    """[K, C, 3, 3] -> for each panel of channels [16, C, panel] of G w G^T, computed in fp64."""
    u = torch.einsum("ir,kcrs,js->ijck", _G, w.double(), _G).float().flatten(0, 1)
    return torch.cat([part.reshape(-1) for part in _to_lanes(u, -1).split(panel(), -1)])


def grouped_weights(w: Tensor) -> Tensor:
    """[K, C / groups, R, S] -> for each vector of channels [R, S, C / groups, lanes]."""
    return w.unflatten(0, (-1, lanes())).permute(0, 3, 4, 2, 1).reshape(-1)


def per_channel(v: Tensor) -> Tensor:
    """[K] -> zeros up to a whole number of vectors."""
    return _to_lanes(v.float()).contiguous()


def _to_lanes(t: Tensor, dim: int = 0) -> Tensor:
    """Zeros after the channels, up to a whole number of vectors."""
    missing = -t.shape[dim] % lanes()
    after = [0, missing] if dim == -1 else [0, 0] * (t.dim() - 1) + [0, missing]
    return F.pad(t, after) if missing else t
