"""The columns of quantization.csv and quantization_layers.csv: what int8 does to trained networks.

A row of the first is a network quantised by one tool, with ranges by one method; a row of the
second one layer of it by itself, in our engine.
"""

from resfuse.bench.records.sheet import ENDED, Sheet

COMMAND = "resfuse study quantization"
ASKED = ("model", "origin", "data", "tool", "method", "calibration_images", "test_images")
_TEXT = frozenset(
    ("model", "origin", "data", "tool", "method", "layer", "device_name", *ENDED)
) - {"schema_version"}  # fmt: skip

NETWORKS = Sheet(
    "quantization.csv",
    (
        *ASKED, "threads", "sqnr_db", "top1_agree_pct", "fp32_top1_pct", "top1_pct",
        "answers_changed", "answers_lost", "answers_gained", "p_value", "device_name", *ENDED,
    ),
    _TEXT - {"layer"},
    COMMAND,
)  # fmt: skip
LAYERS = Sheet(
    "quantization_layers.csv",
    (*ASKED, "layer", "depth", "sqnr_db", "clipped_pct", "device_name", *ENDED),
    _TEXT,
    COMMAND,
)
