"""y = act(x * scale + shift + residual): an inference batch norm that no convolution can absorb.

x [N, C, H, W] -> y of the same shape, NHWC in memory; scale and shift [C], from `bn_scale_shift`.
Pre-activation networks are full of them: there the norm stands before the convolution, behind an
addition. Normalisation, residual and activation take one pass, in fp32.

FLOPs: 2 * N*C*H*W, a multiply-add each. Bytes: x, y and the residual once, so that memory bounds
the kernel: in eager torch norm, addition and activation move 7 such tensors instead of 3. It reads
memory flat, in 16-byte vectors, with no regard to pixels; the channel is the remainder. Its blocks
are bn_act_config.py's.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resfuse.kernels.gpu.bn_act.bn_act_config import CONFIGS, BnActProblem, Config, choose
from resfuse.kernels.gpu.common.arguments import (
    channels_last,
    empty_channels_last,
    require_4d,
    require_like,
)
from resfuse.kernels.gpu.common.epilogue import activate
from resfuse.kernels.gpu.common.launch import Launch, multiprocessors, runs_triton
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope, require_activation
from resfuse.kernels.ops.conv_problem import MATH_MODES, Epilogue, math_mode_of
from resfuse.kernels.tuning_cache.timing_cache import known


def bn_act_ref(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str = "relu",
    slope: Slope = None,
    residual_last: bool = False,
) -> Tensor:
    """`bn_act` in plain torch, in any dtype, computed in at least fp32: the specification."""
    z = x.to(torch.promote_types(x.dtype, scale.dtype))
    z = z * scale[:, None, None] + shift[:, None, None]
    if residual is not None and not residual_last:
        z = z + residual
    y = ACTIVATIONS[activation].forward(z, slope)
    if residual is not None and residual_last:
        y = y + residual
    return y.to(x.dtype)


@triton.jit
def bn_act_kernel(
    x_ptr, scale_ptr, shift_ptr, residual_ptr, slope_ptr, y_ptr,
    elements,
    negative_slope,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < elements - start
    offs_c = ((start % C).to(tl.int32) + offs) % C
    if C % 4 == 0:  # runs of four channels, which Triton does not see through the remainder
        offs_c = tl.max_contiguous(tl.multiple_of(offs_c, 4), 4)

    z = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs_c).to(tl.float32)  # C of each: from L1 but for the first time
    shift = tl.load(shift_ptr + offs_c).to(tl.float32)
    z = z * scale + shift
    if residual_ptr is not None and not RESIDUAL_LAST:
        z += residual
    slope = negative_slope
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + offs_c).to(tl.float32)
    z = activate(z, slope, ACTIVATION)
    if residual_ptr is not None and RESIDUAL_LAST:
        z += residual
    tl.store(y_ptr + start + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    y: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    slope: Slope = None,
    *,
    epilogue: Epilogue | None = None,
    config: Config | None = None,
) -> Launch:
    """The launch that fills y; x, residual and y in channels_last memory, of one dtype.

    Args:
        epilogue: ReLU, behind the residual if there is one, if not given.
        config: `choose`'s if not given.

    Raises:
        ValueError: `config` cannot do this problem, or no kernel computes in x's dtype.
    """
    epilogue = epilogue or Epilogue.of("relu", residual is not None)
    n, c, h, w = x.shape
    problem = BnActProblem(n, c, h, w, math_mode_of(x.dtype), residual is not None)
    config = config or choose(problem, multiprocessors(x.device), known(x.device))
    config.check(problem)
    return Launch(
        kernel=bn_act_kernel,
        grid=(config.ctas(problem),),
        args={
            "x_ptr": x,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "residual_ptr": residual,
            "slope_ptr": slope if isinstance(slope, Tensor) else None,
            "y_ptr": y,
            "elements": problem.elements,
            "negative_slope": 0.0 if slope is None or isinstance(slope, Tensor) else float(slope),
        },
        constants={
            "C": c,
            "ACTIVATION": epilogue.activation,
            "RESIDUAL_LAST": epilogue.residual_last,
            "BLOCK": config.block,
        },
        num_warps=config.num_warps,
        num_stages=1,  # no loop to pipeline
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration in each storage dtype on the join of pre-activation ResNet-200's first
    stage at batch 32."""
    vector = torch.empty(256, dtype=torch.float32, device="meta")
    for mode in ("ieee", "fp16", "bf16"):  # nothing is multiplied by a tensor core: no tf32
        like = torch.empty(0, dtype=MATH_MODES[mode][0], device="meta")
        x = empty_channels_last((32, 256, 56, 56), like)
        for config in CONFIGS:
            made = launch(x, x, vector, vector, x, config=config)
            yield f"{mode} block {config.block} 32x256x56x56 + residual", made


@torch.library.custom_op("resfuse::bn_act", mutates_args=())
def bn_act_op(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    slope: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_last: bool,
) -> Tensor:
    """`bn_act` with a number's slope in `negative_slope`, a tensor's in `slope`."""
    either: Slope = slope.contiguous() if slope is not None else negative_slope
    if not runs_triton(x):
        last = residual_last
        y = bn_act_ref(
            x, scale, shift, residual, activation=activation, slope=either, residual_last=last
        )
        return channels_last(y)
    y = empty_channels_last(x.shape, x)
    if y.numel():
        epilogue = Epilogue.of(activation, residual is not None, residual_last)
        residual = channels_last(residual) if residual is not None else None
        tensors = channels_last(x), scale.contiguous(), shift.contiguous(), residual
        launch(y, *tensors, either, epilogue=epilogue).run()
    return y


@bn_act_op.register_fake
def _fake(x: Tensor, *_: Any) -> Tensor:
    return empty_channels_last(x.shape, x)


@register_flop_formula(torch.ops.resfuse.bn_act)
def _flops(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * x[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.activation, ctx.negative_slope, ctx.residual_last = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In at least fp32, as the forward pass; the activation's input is computed again."""
    x, scale, shift, residual, slope = ctx.saved_tensors
    exact = torch.promote_types(x.dtype, scale.dtype)
    grad, wide = grad.to(exact), x.to(exact)
    z = wide * scale[:, None, None] + shift[:, None, None]
    if residual is not None and not ctx.residual_last:
        z = z + residual
    either: Slope = slope if slope is not None else ctx.negative_slope
    grad_z = ACTIVATIONS[ctx.activation].backward(grad, z, either)
    grad_residual, grad_slope = None, None
    if residual is not None:
        grad_residual = (grad if ctx.residual_last else grad_z).to(residual.dtype)
    if slope is not None:
        grad_slope = (torch.where(z > 0, 0.0, z) * grad).sum((0, 2, 3)).to(slope.dtype)
    return (
        (grad_z * scale[:, None, None]).to(x.dtype),
        (grad_z * wide).sum((0, 2, 3)).to(scale.dtype),
        grad_z.sum((0, 2, 3)).to(shift.dtype),
        grad_residual,
        grad_slope,
        *(None,) * 3,
    )


bn_act_op.register_autograd(_backward, setup_context=_setup_context)


def launch_of(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    slope: Slope,
    epilogue: Epilogue,
) -> Launch:
    """The launch that `bn_act` comes to, of the very tensors given; into a new y.

    Args:
        x, residual: in channels_last memory; the others as for `bn_act`.

    Raises:
        ValueError: as `bn_act`.
    """
    _require_arguments(x, scale, shift, residual, slope, epilogue)
    y = empty_channels_last(x.shape, x)
    tensors = x, scale.contiguous(), shift.contiguous(), residual
    return launch(y, *tensors, slope, epilogue=epilogue)


def _require_arguments(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    slope: Slope,
    epilogue: Epilogue,
) -> None:
    assert (residual is not None) == (epilogue.residual != "none")
    require_4d("x", x)
    channels = x.shape[1]
    require_like("scale", scale, (channels,), x, or_fp32=True)
    require_like("shift", shift, (channels,), x, or_fp32=True)
    require_like("residual", residual, x.shape, x)
    require_activation(epilogue.activation, slope, channels)


def bn_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str = "relu",
    slope: Slope = None,
    residual_last: bool = False,
) -> Tensor:
    """act(x * scale + shift + residual), or act(x * scale + shift) + residual.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16.
        scale, shift: [C], float32 or of x's dtype; a batch norm's are `folding.bn_scale_shift`'s.
        residual: [N, C, H, W].
        activation: one of activation.ACTIVATIONS.
        slope: a number for leaky_relu, a tensor [C] for prelu.
        residual_last: add the residual after the activation.

    Returns:
        [N, C, H, W] in channels_last memory, of x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not one of these.
    """
    epilogue = Epilogue.of(activation, residual is not None, residual_last)
    return checked(x, scale, shift, residual, slope, epilogue)


def checked(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    slope: Slope,
    epilogue: Epilogue,
) -> Tensor:
    """`bn_act`, whose arguments it checks and lays out flat, as the op's schema has them."""
    _require_arguments(x, scale, shift, residual, slope, epilogue)
    activation, last = epilogue.activation, epilogue.residual_last
    slopes = slope if isinstance(slope, Tensor) and activation == "prelu" else None
    number = float(slope) if isinstance(slope, float | int) else 0.0
    return bn_act_op(x, scale, shift, residual, slopes, activation, number, last)
