"""Mean and 1 / sqrt(variance + eps) of each channel of a batch, and the running statistics.

x [N, C, H, W], NHWC in memory -> mean, rstd [C] in fp32; the running mean and the (unbiased)
running variance move towards the batch's by `momentum`. x is read once, 4 FLOPs an element.

The kernels and their launches are batch_statistics_kernel.py's, their tiles batch_norm_config.py's.
"""

from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import (
    Partials,
    config_of,
    empty_partials,
    launch_merge,
    launch_partials,
    merged_ref,
    problem_of,
)
from resfuse.kernels.gpu.batch_norm.reference import computes, wide
from resfuse.kernels.gpu.batch_norm.sync_batch_norm import gather_statistics
from resfuse.kernels.gpu.common.arguments import channels_last, require_4d, require_like
from resfuse.kernels.ops.conv_problem import math_mode_of


def batch_statistics_ref(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification in plain torch: mean and rstd [C], in at least fp32."""
    var, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def whole(x: Tensor) -> Partials:
    """Statistics of x as one part, in plain torch; an empty x has none."""
    count = x.numel() // max(1, x.shape[1])
    if not count:
        return empty_partials(x, 0)
    var, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
    return Partials(torch.stack([mean, var * count])[:, None], mean.new_full((1,), count))


@torch.library.custom_op("resfuse::bn_partials", mutates_args=())
def bn_partials_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values and counts of `Partials`."""
    if not computes(x):
        return whole(x)
    x = channels_last(x)
    config = config_of(x)
    partials = empty_partials(x, config.grid(problem_of(x))[0])
    launch_partials(x, partials, config).run()
    return partials


@bn_partials_op.register_fake
def _fake_partials(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_partials(x, config_of(x).grid(problem_of(x))[0] if computes(x) else 1)


@torch.library.custom_op("resfuse::bn_merge", mutates_args=("running_mean", "running_var"))
def bn_merge_op(
    values: Tensor,
    counts: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """mean and rstd [C] of all parts."""
    partials = Partials(values, counts)
    if computes(values):
        mean, rstd = _fake_merge(values)
        launch_merge(partials, running_mean, running_var, mean, rstd, momentum, eps).run()
        return mean, rstd
    total, mean, m2 = merged_ref(partials)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((m2 / (total - 1)).to(running_var.dtype), momentum)
    return mean, torch.rsqrt(m2 / total + eps)


@bn_merge_op.register_fake
def _fake_merge(values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape[2]), values.new_empty(values.shape[2])


def batch_statistics(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    partials: Partials | None = None,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(biased variance + eps) of each channel. They carry no gradient:
    `bn_add_relu` accounts for how they depend on x.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16; or float64, in plain torch.
        running_mean, running_var: [C] of any float dtype; they become
            (1 - momentum) * running + momentum * batch, the variance's estimate unbiased.
        eps: added to the variance.
        partials: of x, where they are known: from `conv_statistics`.
        group: name of the process group whose x are one batch, each process's a part of it; every
            process of it must call this, even of an empty x.

    Returns:
        mean and rstd [C], in fp32 (float64 of a float64 x).

    Raises:
        ValueError: an argument's shape, dtype or device is not one of these, or a channel has fewer
            than two values and no group adds to them.
    """
    require_4d("x", x)
    if x.dtype != torch.float64:
        math_mode_of(x.dtype)
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is not None:
            require_like(name, buffer, x.shape[1:2], x.new_empty(0, dtype=buffer.dtype))
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count < 2 and group is None:
        # torch's own words (torch.nn.functional._verify_batch_size)
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    with torch.no_grad():
        partials = Partials(*(bn_partials_op(x.detach()) if partials is None else partials))
        if group is not None:
            partials = gather_statistics(partials, group)
        return bn_merge_op(*partials, running_mean, running_var, momentum, eps)
