"""A row of kernels.csv: one provider on one convolution of one network."""

from resfuse.bench.records.case_row import Outcome, Stamp
from resfuse.bench.records.convolutions import Convolution
from resfuse.bench.records.layer_metrics import KERNEL_METRICS
from resfuse.bench.records.results import Sheet
from resfuse.bench.records.sample import Value

SCHEMA_VERSION = 1
OP = "conv_relu"
ASKED = (
    "model", "op", "shape", "dtype", "provider", "count", "layer", "infer_img_size",
    "requested_batch_size", "precision", "math_mode", "device_name", "gmacs", "least_mb",
)  # fmt: skip
ENDED = ("status", "error", "env_id", "commit", "timestamp", "schema_version")
TEXT = (
    "model", "op", "shape", "dtype", "provider", "layer", "precision", "math_mode", "device_name",
    "throttle", "status", "error", "env_id", "commit", "timestamp",
)  # fmt: skip
SHEET = Sheet(
    "kernels.csv", (*ASKED, *KERNEL_METRICS, *ENDED), frozenset(TEXT), "resfuse kernels",
    frozenset(KERNEL_METRICS), SCHEMA_VERSION,
)  # fmt: skip


def record(
    convolution: Convolution, provider: str, outcome: Outcome, stamp: Stamp
) -> dict[str, Value]:
    """One row, keyed by column; anything but `pass` leaves the speed columns empty.

    `gmacs` and `least_mb` (2**20 bytes, every tensor moved once) are of one call.
    """
    problem = convolution.problem
    values: dict[str, Value] = {
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
        **outcome.metrics,
        "device_name": stamp.device_name,
        "status": outcome.status,
        "error": outcome.error,
        "env_id": stamp.env_id,
        "commit": stamp.commit,
        "timestamp": stamp.timestamp,
        "schema_version": SCHEMA_VERSION,
    }
    return {column: values.get(column) for column in SHEET.columns}
