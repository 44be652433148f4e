"""The columns of kernels.csv, a row of which is one provider on one convolution of one network."""

from typing import TYPE_CHECKING

from resfuse.bench.records.layer_metrics import KERNEL_METRICS
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import ENDED, Sheet

if TYPE_CHECKING:
    from resfuse.bench.records.convolutions import Convolution

OP = "conv_relu"
ASKED = (
    "model", "op", "shape", "dtype", "provider", "count", "layer", "infer_img_size",
    "requested_batch_size", "precision", "math_mode", "device_name", "gmacs", "least_mb",
)  # fmt: skip
TEXT = (
    "model", "op", "shape", "dtype", "provider", "layer", "precision", "math_mode", "device_name",
    "throttle", "status", "error", "env_id", "commit", "timestamp",
)  # fmt: skip
SHEET = Sheet(
    "kernels.csv", (*ASKED, *KERNEL_METRICS, *ENDED), frozenset(TEXT), "resfuse kernels",
    frozenset(KERNEL_METRICS),
)  # fmt: skip


def asked(convolution: "Convolution", provider: str) -> dict[str, Value]:
    """Returns what a row says of the convolution and of the provider that computes it.

    `gmacs` and `least_mb` (2**20 bytes, every tensor moved once) are of one call.
    """
    problem = convolution.problem
    return {
        "model": convolution.model,
        "op": OP,
        "shape": convolution.shape,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "provider": provider,
        "count": convolution.count,
        "layer": convolution.layer,
        "infer_img_size": convolution.img_size,
        "requested_batch_size": problem.n,
        "precision": convolution.precision,
        "math_mode": problem.math_mode,
        "gmacs": problem.macs / 1e9,
        "least_mb": problem.least_bytes / 2**20,
    }
