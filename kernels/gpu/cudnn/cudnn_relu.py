"""relu(conv(x) + b) by cuDNN, in the forms that torch offers.

torch's fused operation is relu(conv(x, w) + alpha z + b), and the question is what z is where there
is nothing to add. torch.cudnn_convolution_relu passes the output itself, times zero, before it has
been written (ATen's ConvShared.cpp: "use output_t as z"): NaN if the plan reads it and the memory
holds NaN. Zeros as large as the output are one more tensor to read, 2.1 GB or 0.5 ms of ResNet-50's
5.3 at batch 256 on an H200. Zeros of one pixel cost nothing, if cuDNN broadcasts them.
gpu/cudnn/cudnn_probe.py decides between them; the backend `cudnn_fused`, the engine's tactic and
the provider `cudnn` all go by that.

torch keeps cuDNN's plans by thread, under a key that has alpha but neither z's shape nor
torch.backends.cudnn.benchmark (ATen's Conv_v8.cpp, CacheKeyFused). So a plan made for one z would
run with another, beyond its end: every shape of z has an alpha of its own. And the
first run of a convolution in a thread decides whether its plan is searched for or taken from
heuristics, for all later runs in the process.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.ops.conv_problem import Geometry

Blank = Callable[[int], Tensor]  # zeros [count] of x's dtype, on its device; nobody writes to them

FORMS = {
    "relu_op": "torch.cudnn_convolution_relu",
    "zeros": "torch.cudnn_convolution_add_relu, zeros of the output's size added",
    "channel_zeros": "torch.cudnn_convolution_add_relu, zeros of one pixel added",
    "plain": "torch's convolution, then ReLU in place",
}
# relu_op's is 0, of a z of the same shape; 1 is a residual's.
_ALPHA = {"zeros": 0.0, "channel_zeros": 0.5}


@dataclass(frozen=True)
class Way:
    """What cuDNN is asked for, by a name in FORMS, and whether torch searches its plans."""

    form: str
    search: bool

    def label(self) -> str:
        return self.form + ", searched" * self.search


def zeros_for(form: str, y_shape: Sequence[int], blank: Blank) -> Tensor | None:
    """The z [N, K, P, Q] or [1, K, 1, 1] of a form, in channels_last; None where it takes none.

    Args:
        form: a name in FORMS.
        y_shape: of the output, (N, K, P, Q).
        blank: makes or shares zeros of a number of elements.
    """
    n, k, p, q = y_shape
    if form == "zeros":
        return blank(n * k * p * q).view(n, p, q, k).permute(0, 3, 1, 2)
    if form == "channel_zeros":  # strides as of any image in channels_last, or ATen copies it
        return blank(k).as_strided((1, k, 1, 1), (k, 1, k, k))
    return None


def conv_relu(
    form: str, x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, geometry: Geometry
) -> Tensor:
    """relu(conv(x, weight) + bias), [N, K, P, Q].

    Args:
        form: a name in FORMS.
        x: [N, C, H, W], like `weight` [K, C / groups, R, S] in channels_last.
        weight: of the convolution.
        bias: [K].
        z: `zeros_for` the form.
    """
    if form == "relu_op":
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    if form == "plain":
        return F.conv2d(x, weight, bias, *geometry).relu_()
    assert z is not None
    return torch.cudnn_convolution_add_relu(x, weight, z, _ALPHA[form], bias, *geometry)


@contextlib.contextmanager
def searching(wanted: bool) -> Iterator[None]:
    """A context in which torch searches cuDNN's plans for what it has not run yet, or does not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
