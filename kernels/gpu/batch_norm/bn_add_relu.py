"""y = relu(bn(x) + residual), or relu(bn(x) + bn2(x2)) with a projection: the join of a block.

x, residual, x2 and y [N, C, H, W], NHWC in memory. Fused: normalisation, sum and ReLU in one pass;
backward, the ReLU's mask (from y), both reductions of either norm in one pass, and all gradients in
a second. Batch norm with or without activation is the same op with nothing added. Statistics come
from `batch_statistics`, in a pass of their own or from the convolution that made x.

Bytes an element in 16 bits: forward 6 (x, residual, y; without statistics), backward 6 + 10; eager
torch moves 14 and 24. Kept for the backward pass: x, y (which the next layer keeps anyway), x2. The
idea is MLPerf's BatchNormAddRelu (cuDNN's bnAddRelu, Apex's groupbn).

The kernels and their launches are bn_add_relu_kernel.py's, their tiles batch_norm_config.py's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resfuse.kernels.gpu.batch_norm.batch_statistics import batch_statistics
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import Partials, config_of, problem_of
from resfuse.kernels.gpu.batch_norm.bn_add_relu_kernel import (
    Normed,
    added_kind,
    launch_backward,
    launch_forward,
    launch_reduce,
    launch_total,
)
from resfuse.kernels.gpu.batch_norm.reference import computes, wide
from resfuse.kernels.gpu.batch_norm.sync_batch_norm import sum_gradients
from resfuse.kernels.gpu.common.arguments import (
    channels_last,
    empty_channels_last,
    require_4d,
    require_like,
)
from resfuse.kernels.ops.conv_problem import math_mode_of

ACTIVATIONS = ("identity", "relu")  # those whose derivative follows from their result


@dataclass(frozen=True)
class Norm:
    """A batch norm as torch.nn.functional.batch_norm takes it; every tensor [C] or None.

    training: normalise by the batch's own statistics, and move the running ones if they are given;
        else by the running ones, which are then constants.
    group: in training, the batch is that of all processes of the process group of this name, as
        torch.nn.SyncBatchNorm has it; all of them must take the same steps, forward and backward.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    group: str | None = None

    def require_for(self, x: Tensor, name: str = "norm") -> None:
        """Raises ValueError unless x [N, C, H, W] can be normalised by it."""
        if x.dtype != torch.float64:
            math_mode_of(x.dtype)
        for part in ("weight", "bias"):
            require_like(f"{name}.{part}", getattr(self, part), x.shape[1:2], x, or_fp32=True)
        for part in ("running_mean", "running_var"):
            buffer = getattr(self, part)
            if buffer is not None:
                like = x.new_empty(0, dtype=buffer.dtype)
                require_like(f"{name}.{part}", buffer, x.shape[1:2], like)
            elif not self.training:
                raise ValueError(
                    f"argument {name}.{part}: None; accepted: a tensor [{x.shape[1]}], or "
                    "training=True"
                )

    def statistics(self, x: Tensor, partials: Partials | None = None) -> tuple[Tensor, Tensor]:
        """mean and rstd [C] for x, which carry no gradient; moves the running statistics."""
        if self.training:
            return batch_statistics(
                x,
                self.running_mean,
                self.running_var,
                momentum=self.momentum,
                eps=self.eps,
                partials=partials,
                group=self.group,
            )
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            return wide(self.running_mean), (wide(self.running_var) + self.eps).rsqrt()


def bn_add_relu_ref(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    *,
    shortcut: tuple[Tensor, Norm] | None = None,
    activation: str = "relu",
) -> Tensor:
    """`bn_add_relu` in torch's own layers, in any dtype: the specification, gradients included."""
    z = _batch_norm(x, norm)
    if shortcut is not None:
        z = z + _batch_norm(*shortcut)
    elif residual is not None:
        z = z + residual
    return F.relu(z) if activation == "relu" else z


def _batch_norm(x: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training,
        norm.momentum, norm.eps,
    )  # fmt: skip


@torch.library.custom_op("resfuse::bn_add_relu", mutates_args=())
def bn_add_relu_op(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    mean2: Tensor | None,
    rstd2: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    batch: bool,
    batch2: bool,
    relu: bool,
    group: str | None = None,
) -> Tensor:
    """`bn_add_relu` of known statistics; `batch`: they are x's own, or those of all x in `group`,
    which the backward pass asks for its sums."""
    main, shortcut = _normed(x, mean, rstd, weight, bias, x2, mean2, rstd2, weight2, bias2)
    if not computes(x):
        z = _apply(main)
        if shortcut is not None:
            z = z + _apply(shortcut)
        elif residual is not None:
            z = z + residual
        return channels_last((F.relu(z) if relu else z).to(x.dtype))
    y = empty_channels_last(x.shape, x)
    if y.numel():
        added = None if residual is None else channels_last(residual)
        launch_forward(y, main, added, shortcut, relu=relu).run()
    return y


@bn_add_relu_op.register_fake
def _fake(x: Tensor, *_: Any) -> Tensor:
    return empty_channels_last(x.shape, x)


@register_flop_formula(torch.ops.resfuse.bn_add_relu)
def _flops(
    x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, residual: Any, x2: Any, *_: Any,
    out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    return (6 if x2 is not None else 3) * x[0] * x[1] * x[2] * x[3]


def _normed(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    x2: Tensor | None, mean2: Tensor | None, rstd2: Tensor | None, weight2: Tensor | None,
    bias2: Tensor | None, batch: bool = True, batch2: bool = True,
) -> tuple[Normed, Normed | None]:  # fmt: skip
    main = Normed(channels_last(x), mean, rstd, weight, bias, batch)
    if x2 is None or mean2 is None or rstd2 is None:
        return main, None
    return main, Normed(channels_last(x2), mean2, rstd2, weight2, bias2, batch2)


def _apply(normed: Normed) -> Tensor:
    """bn(x) in plain torch, in the statistics' dtype."""
    mean, bias = normed.mean, normed.bias
    z = (normed.x.to(mean.dtype) - mean[:, None, None]) * _scale(normed)[:, None, None]
    return z if bias is None else z + bias[:, None, None]


def _scale(normed: Normed) -> Tensor:
    return normed.rstd if normed.weight is None else normed.rstd * normed.weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, rstd, weight, _, _, x2, mean2, rstd2, weight2, _, *ctx.flags = inputs
    y = output if ctx.flags[2] else None
    ctx.save_for_backward(y, x, mean, rstd, weight, x2, mean2, rstd2, weight2)
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in range(11)]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    batch, batch2, relu, group = ctx.flags
    wanted = list(ctx.needs_input_grad)
    saved = ctx.saved_tensors  # asked for once: checkpointing computes them anew at every look
    is_shortcut = saved[5] is not None
    # g is grad itself without a ReLU: then a residual's gradient need not be written
    writes = wanted[6] or (wanted[5] and relu)
    of_norms = [wanted[i] for i in (3, 4, 9, 10)]
    grad_x, grad_added, grads = bn_add_relu_backward_op(
        grad, *saved, batch, batch2, wanted[0], writes, any(of_norms), group
    )
    made: list[Tensor | None] = [None] * len(wanted)
    made[0] = grad_x if wanted[0] else None
    made[6 if is_shortcut else 5] = grad_added if writes else None
    if wanted[5] and not relu:
        made[5] = grad
    for index, row in ((3, 1), (4, 0), (9, 2), (10, 0)):
        if wanted[index]:
            # copied: both biases have one gradient, and autograd adds to what it is given in place
            made[index] = grads[row].to(ctx.dtypes[index], copy=True)
    return tuple(made)


bn_add_relu_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("resfuse::bn_add_relu_backward", mutates_args=())
def bn_add_relu_backward_op(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    x2: Tensor | None,
    mean2: Tensor | None,
    rstd2: Tensor | None,
    weight2: Tensor | None,
    batch: bool,
    batch2: bool,
    needs_x: bool,
    needs_added: bool,
    needs_norms: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of what was added, and grads [2 or 3, C] of bias, weight and the
    shortcut's weight; those not needed are empty. `y` only where there was a ReLU."""
    main, shortcut = _normed(
        x, mean, rstd, weight, None, x2, mean2, rstd2, weight2, None, batch, batch2
    )
    needs_sums = (batch and needs_x) or (batch2 and needs_added and x2 is not None)
    if not needs_sums:
        group = None
    if not computes(x):
        return _backward_ref(grad, y, main, shortcut, needs_x, needs_added, group)
    grad_x, grad_added, grads = _empty_grads(x, mean, x2, needs_x, needs_added)
    if not x.numel():
        _over_processes(grads.zero_(), x, group)
        return grad_x, grad_added, grads
    grad, y = channels_last(grad), None if y is None else channels_last(y)
    if needs_norms or needs_sums:
        config = config_of(main.x, added_kind(None, shortcut))
        parts = config.grid(problem_of(x))[0]
        sums = grads.new_empty(len(grads), parts, x.shape[1])
        launch_reduce(sums, grad, y, main, shortcut, config).run()
        launch_total(grads, sums, main, shortcut).run()
    if needs_x or needs_added:
        launch_backward(
            grad_x if needs_x else None, grad_added if needs_added else None,
            _over_processes(grads, x, group), grad, y, main, shortcut,
        ).run()  # fmt: skip
    return grad_x, grad_added, grads


def _over_processes(grads: Tensor, x: Tensor, group: str | None) -> Tensor:
    """The sums x's gradient depends on: of all processes, if they share their statistics."""
    return grads if group is None else sum_gradients(grads, x.numel() // x.shape[1], group)


def _empty_grads(
    x: Tensor, mean: Tensor, x2: Tensor | None, needs_x: bool, needs_added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_channels_last(x.shape, x) if needs_x else x.new_empty(0),
        empty_channels_last(x.shape, x) if needs_added else x.new_empty(0),
        mean.new_empty(2 if x2 is None else 3, x.shape[1]),
    )


@bn_add_relu_backward_op.register_fake
def _fake_backward(
    grad: Tensor, y: Any, x: Tensor, mean: Tensor, rstd: Any, weight: Any, x2: Any, mean2: Any,
    rstd2: Any, weight2: Any, batch: bool, batch2: bool, needs_x: bool, needs_added: bool,
    needs_norms: bool, group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_grads(x, mean, x2, needs_x, needs_added)


def _backward_ref(
    grad: Tensor, y: Tensor | None, main: Normed, shortcut: Normed | None, needs_x: bool,
    needs_added: bool, group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the kernels compute, in plain torch: bn_add_relu_kernel.py has the formulas."""
    g = grad.to(main.mean.dtype)
    if y is not None:
        g = torch.where(y <= 0, 0.0, g)
    normed = [main] if shortcut is None else [main, shortcut]
    hats = [(n.x.to(g.dtype) - n.mean[:, None, None]) * n.rstd[:, None, None] for n in normed]
    grads = torch.stack([g.sum((0, 2, 3)), *((g * hat).sum((0, 2, 3)) for hat in hats)])
    sums = _over_processes(grads, main.x, group)
    made = []
    for n, hat, row in zip(normed, hats, sums[1:], strict=True):
        grad_in = g
        if n.batch:
            count = g.numel() // g.shape[1]
            grad_in = g - (sums[0][:, None, None] + hat * row[:, None, None]) / count
        made.append(channels_last((grad_in * _scale(n)[:, None, None]).to(n.x.dtype)))
    added = made[1] if shortcut is not None else channels_last(g.to(grad.dtype))
    empty = main.x.new_empty(0)
    return made[0] if needs_x else empty, added.clone() if needs_added else empty, grads


def _refuse_second(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "bn_add_relu has no second derivative; accepted: one backward pass. A fused model has one "
        "again after resfuse.kernels.unfuse(model)"
    )


bn_add_relu_backward_op.register_autograd(_refuse_second)


def bn_add_relu(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    *,
    shortcut: tuple[Tensor, Norm] | None = None,
    activation: str = "relu",
    partials: Partials | None = None,
    shortcut_partials: Partials | None = None,
) -> Tensor:
    """relu(bn(x)), relu(bn(x) + residual) or relu(bn(x) + bn2(x2)), or the same without ReLU.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16; or float64, in plain torch.
        norm: its batch norm; weight and bias [C] of x's dtype or float32. Running statistics are
            moved in place, as torch does.
        residual: [N, C, H, W].
        shortcut: x2 [N, C, H, W] and its batch norm.
        activation: "relu" or "identity".
        partials, shortcut_partials: statistics of x and x2 where they are known, from
            `conv_statistics`.

    Returns:
        [N, C, H, W] in channels_last memory, of x's dtype. It has gradients of x, what is added,
        and all weights and biases, but no second ones.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not one of these, a channel has
            fewer than two values to normalise by, or two norms in training are of two groups.
        RuntimeError: in a second backward pass.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"argument activation: {activation!r}; accepted: {', '.join(ACTIVATIONS)}")
    if residual is not None and shortcut is not None:
        raise ValueError("argument shortcut: beside a residual; accepted: one of them")
    require_4d("x", x)
    norm.require_for(x)
    require_like("residual", residual, x.shape, x)
    mean2, rstd2, weight2, bias2 = None, None, None, None
    x2, norm2 = shortcut if shortcut is not None else (None, None)
    x = channels_last(x)
    if x2 is not None and norm2 is not None:
        require_like("shortcut", x2, x.shape, x)
        norm2.require_for(x2, "shortcut")
        x2 = channels_last(x2)
    group = _group_of(norm, norm2)
    mean, rstd = norm.statistics(x, partials)
    if x2 is not None and norm2 is not None:
        mean2, rstd2 = norm2.statistics(x2, shortcut_partials)
        weight2, bias2 = norm2.weight, norm2.bias
    return bn_add_relu_op(
        x, mean, rstd, norm.weight, norm.bias, residual, x2, mean2, rstd2, weight2, bias2,
        norm.training, norm2 is not None and norm2.training, activation == "relu", group,
    )  # fmt: skip


def _group_of(norm: Norm, norm2: Norm | None) -> str | None:
    """The group over which a join sums, for both norms at once."""
    groups = [n.group for n in (norm, norm2) if n is not None and n.training]
    if len(set(groups)) > 1:
        raise ValueError(
            f"argument shortcut: its norm's group is {groups[1]!r}; accepted: {groups[0]!r}, norm's"
        )
    return groups[0] if groups else None
