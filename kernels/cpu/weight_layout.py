"""Packs weights as the native steps read them: see conv_direct.h, conv3x3_winograd.h and
conv_grouped.h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.cpu.program import lanes, nr, whole_vectors

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015: F(2, 3)
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def direct_weights(w: Tensor, groups: int = 1) -> Tensor:
    """Packs [K, C / groups, R, S] as [R, S, C, panel] for each group and panel of channels in
    it."""
    return torch.cat(
        [
            part.permute(2, 3, 1, 0).reshape(-1)
            for group in w.chunk(groups)
            for part in _to_lanes(group).split(nr())
        ]
    )


def paired_weights(w: Tensor, groups: int = 1) -> Tensor:
    """Packs [K, C / groups, R, S], rounded to bfloat16, as [R, S, pairs of C, panel, 2] for each
    group and panel of channels in it. Beside the last of an odd number of channels are zeros."""
    return _weights_in_units(w.bfloat16(), 2, groups)


def quad_weights(w: Tensor, groups: int = 1) -> Tensor:
    """Packs [K, C / groups, R, S], int8, as [R, S, fours of C, panel, 4] for each group and panel
    of channels in it; behind the last channels are zeros. It is the packing of VNNI's instructions,
    and of all others."""
    return _weights_in_units(w, 4, groups)


def _weights_in_units(w: Tensor, unit: int, groups: int) -> Tensor:
    w = F.pad(w, (0, 0, 0, 0, 0, -w.shape[1] % unit)).unflatten(1, (-1, unit))
    return torch.cat(
        [
            part.permute(3, 4, 1, 0, 2).reshape(-1)
            for group in w.chunk(groups)
            for part in _to_lanes(group).split(nr())
        ]
    )


def direct_from(laid_out: Tensor, shape: torch.Size) -> Tensor:
    """The weight [K, C, R, S] that direct_weights laid out."""
    k, c, r, s = shape
    sizes = [c * r * s * min(nr(), whole_vectors(k) - first) for first in range(0, k, nr())]
    parts = [part.view(r, s, c, -1) for part in laid_out.split(sizes)]
    weight = torch.cat(parts, -1)[..., :k].permute(3, 2, 0, 1)
    return weight.contiguous(memory_format=torch.channels_last)


def paired_from(laid_out: Tensor, shape: torch.Size) -> Tensor:
    """Returns the weight [K, C, R, S] in bfloat16 that paired_weights has packed."""
    return _from_units(laid_out, 2, shape)


def quad_from(laid_out: Tensor, shape: torch.Size) -> Tensor:
    """Returns the weight [K, C, R, S] in int8 that quad_weights has packed."""
    return _from_units(laid_out, 4, shape)


def _from_units(laid_out: Tensor, unit: int, shape: torch.Size) -> Tensor:
    k, c, r, s = shape
    units = -(-c // unit)
    panels = [min(nr(), whole_vectors(k) - first) for first in range(0, k, nr())]
    sizes = [unit * units * r * s * panel for panel in panels]
    parts = [part.view(r, s, units, -1, unit) for part in laid_out.split(sizes)]
    weight = torch.cat(parts, -2)[..., :k, :].permute(3, 2, 4, 0, 1).flatten(1, 2)[:, :c]
    return weight.contiguous(memory_format=torch.channels_last)


def winograd_weights(w: Tensor, groups: int = 1) -> Tensor:
    """Packs G w G^T of a weight [K, C / groups, 3, 3], computed in fp64, as [16, C, panel] for each
    group and panel of channels in it."""
    g = torch.tensor(_G, dtype=torch.float64, device=w.device)
    u = torch.einsum("ir,kcrs,js->ijck", g, w.double(), g).float().flatten(0, 1)
    return torch.cat(
        [
            part.reshape(-1)
            for group in u.chunk(groups, -1)
            for part in _to_lanes(group, -1).split(nr(), -1)
        ]
    )


def grouped_weights(w: Tensor) -> Tensor:
    """Packs [K, C / groups, R, S] as [R, S, i, lanes] for each vector of channels: the factors by
    which lane l multiplies input channel l ^ i of its vector; zeros behind the last channel."""
    by_lane = _to_lanes(w[_shuffled(w.shape, w.device)])
    by_vector: Tensor = by_lane.unflatten(0, (-1, lanes()))
    return by_vector.permute(0, 3, 4, 2, 1).reshape(-1)


def grouped_from(laid_out: Tensor, shape: torch.Size) -> Tensor:
    """Returns the weight [K, C / groups, R, S] that grouped_weights has packed."""
    k, of_each, r, s = shape
    by_lane = laid_out.view(-1, r, s, of_each, lanes()).permute(0, 4, 3, 1, 2).flatten(0, 1)[:k]
    weight = by_lane[_shuffled(shape, laid_out.device)]  # its own inverse
    return weight.contiguous(memory_format=torch.channels_last)


def _shuffled(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the indices of w[k, k ^ i]."""
    k, i = (torch.arange(size, dtype=torch.int64, device=device) for size in shape[:2])
    k = k[:, None]
    return k, (k % len(i)) ^ i


def per_channel(v: Tensor) -> Tensor:
    """Returns [K] as float32, padded with zeros to a whole number of vectors."""
    return _to_lanes(v.float()).contiguous()


def integers_per_channel(v: Tensor) -> Tensor:
    """Returns [K] as int32, padded with zeros to a whole number of vectors."""
    return _to_lanes(v.to(torch.int32)).contiguous()


def with_spare_vector(v: Tensor) -> Tensor:
    """Returns parameters of channels [K] with a vector of zeros behind: the last vector of a group
    that fills none is read there."""
    return F.pad(v, (0, lanes()))


def _to_lanes(t: Tensor, dim: int = 0) -> Tensor:
    """Pads the channels in dimension `dim` with zeros to a whole number of vectors."""
    missing = -t.shape[dim] % lanes()
    after = [0, missing] if dim == -1 else [0, 0] * (t.dim() - 1) + [0, missing]
    return F.pad(t, after) if missing else t


def slopes(slope: Tensor | float, channels: int) -> Tensor:
    """Returns a slope for each channel, from a tensor [K], a tensor of one element or a number."""
    if not isinstance(slope, Tensor):
        slope = torch.tensor(slope, dtype=torch.float32, device="cpu")
    return per_channel(slope.reshape(-1).expand(channels))
