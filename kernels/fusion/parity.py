"""Checks, once when a model is fused, that it still gives the same answer to an example."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resfuse.kernels.fusion.matching.layer_kinds import copied
from resfuse.kernels.ops.conv_problem import math_mode_of
from resfuse.kernels.ops.memory_format import to_memory_format
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES


def require_parity(
    model: nn.Module,
    example: Tensor,
    without: AbstractContextManager[nn.Module],
    computed: torch.dtype,
) -> None:
    """Compares a fused model's answers with its own layers', both judged by fp64.

    Args:
        model: fused.
        example: [N, C, H, W].
        without: a context in which the model runs unfused.
        computed: what the fused model computes in: the unfused one is compared in that dtype.

    Raises:
        ValueError: the model refuses the example, or the fused answer is further from the fp64 one
            than twice the unfused answer's distance in the worse of both memory formats (plus the
            tolerance of the dtype).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            with without:
                narrow = model if computed == example.dtype else copied(model).to(computed)
                eager = _answer(narrow, example.to(computed))
                # Fused layers compute in channels_last, where torch sums in another order: a U-Net
                # in fp32 is off by 1.9e-6 in NCHW and by 3.9e-6 in NHWC.
                nhwc = to_memory_format(copied(narrow), torch.channels_last)
                given = example.to(computed, memory_format=torch.channels_last)
                eager_nhwc = _answer(nhwc, given)
                own = nhwc if narrow is model else copied(model)
                twin = to_memory_format(own.double(), torch.channels_last)
            reference = _answer(twin, example.double())
            fused = _answer(model, example)
    finally:
        for module, training in modes.items():
            module.training = training
    mode = "fp64" if example.dtype == torch.float64 else math_mode_of(computed)
    for got, nchw, nhwc_answer, want in zip(fused, eager, eager_nhwc, reference, strict=True):
        eagers = max(_error(nchw, want), _error(nhwc_answer, want))
        allowed = EAGER_FACTOR * eagers + TOLERANCES[mode].rtol
        found = _error(got, want)
        if not found <= allowed:
            raise ValueError(
                f"argument model: fused, its answer to the example is off by {found:.3g} against "
                f"fp64, where {allowed:.3g} is accepted; please report the model"
            )


def _answer(model: nn.Module, example: Tensor) -> list[Tensor]:
    try:
        outputs = model(example.clone())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"argument example: shape {tuple(example.shape)} of {example.dtype} on "
            f"{example.device}; accepted: what the model takes ({reason})"
        ) from error
    return [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _error(got: Tensor, want: Tensor) -> float:
    """Returns the relative L2 error, 0 where both are empty or zero."""
    distance = float((got.double() - want.double()).norm())
    size = float(want.double().norm())
    return distance / size if size else distance
