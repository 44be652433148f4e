"""The flags of `resfuse roofline`."""

import argparse
from pathlib import Path

from resfuse.bench.records.precision_names import FLOATING
from resfuse.bench.running.shared_flags import (
    MODELS_HELP,
    add_batch_sizes,
    add_device,
    add_img_size,
    add_model_kwargs,
    add_precisions,
    add_results,
    add_threads,
    model_names,
    names,
)


def add_roofline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", type=model_names, help=MODELS_HELP)
    parser.add_argument(
        "--gpu",
        type=names,
        default=[],
        metavar="NAMES",
        help="cards by their data sheets, predicted: a100, h100, h200, b200, l4, l40s, rtx4090, "
        "rtx5090, mi300x (default: this device, measured)",
    )
    add_batch_sizes(parser, "default: 1,32,256")
    add_precisions(parser, f"{', '.join(FLOATING)} (default: float16, on a CPU float32)")
    add_img_size(parser)
    add_model_kwargs(parser)
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--layers", action="store_true", help="show every distinct layer, too")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write all lines to this file")
    add_results(
        parser,
        "rates recorded here count where they are higher; nothing is written (default: results)",
    )
