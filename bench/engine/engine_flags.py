"""The flags of `resfuse engine`."""

import argparse
from pathlib import Path

from resfuse.bench.records.precision_names import FLOATING
from resfuse.bench.running.shared_flags import (
    MODEL_HELP,
    add_batch_sizes,
    add_device,
    add_img_size,
    add_model_kwargs,
    add_seed,
    add_weights,
    positive,
)


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_batch_sizes(parser, "images; several with commas (default: 1, or those of the file)")
    parser.add_argument(
        "--precision", default="float32", metavar="NAME", help=f"{', '.join(FLOATING)} (default: "
        "float32)"
    )  # fmt: skip
    add_img_size(parser)
    add_model_kwargs(parser)
    add_weights(parser)
    add_device(parser)
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the engine to this file")
    parser.add_argument(
        "--load", metavar="FILE", type=Path, help="take the engine from this file instead"
    )
    parser.add_argument(
        "--timings",
        metavar="DIR",
        type=Path,
        help="where measured times are kept for the next build (default: the user's cache)",
    )
    parser.add_argument(
        "--time",
        type=positive,
        default=2.0,
        metavar="S",
        help="timed seconds a batch size, eager included (default: %(default)g)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all of it to this file")
    add_seed(parser)
