"""Where training kernels run, and the precision of their plain-torch twins."""

import torch
from torch import Tensor

from resfuse.kernels.gpu.common.launch import runs_triton


def computes(x: Tensor) -> bool:
    """True where an op on `x` launches its kernel. float64, which no kernel computes in, is the
    twin's everywhere: gradients are checked against finite differences in it."""
    return runs_triton(x) and x.dtype != torch.float64


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32, as the kernels compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
