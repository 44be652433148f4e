"""One plan or bound of a network: `resfuse engine`, `roofline`."""

import argparse
from pathlib import Path

from resfuse.bench.flags.flag_values import names, numbers, positive
from resfuse.bench.flags.shared_flags import add_device, add_img_size, add_seed, add_threads
from resfuse.bench.records.case import PRECISIONS


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a network; see `resfuse list models`")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=numbers,
        default=[],
        metavar="N",
        help="images; several with commas (default: 1, or those of the file)",
    )
    parser.add_argument(
        "--precision", default="float32", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: "
        "float32)"
    )  # fmt: skip
    add_img_size(parser)
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


def add_roofline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", type=names, help="networks; wildcards allowed"
    )
    parser.add_argument(
        "--gpu",
        type=names,
        default=[],
        metavar="NAMES",
        help="cards by their data sheets, predicted: a100, h100, h200, b200, l4, l40s, rtx4090, "
        "rtx5090, mi300x (default: this device, measured)",
    )
    parser.add_argument(
        "-b", "--batch-size", type=numbers, default=[], metavar="N", help="default: 1,32,256"
    )
    parser.add_argument(
        "--precision",
        type=names,
        default=[],
        metavar="NAMES",
        help=f"{', '.join(PRECISIONS)} (default: float16, on a CPU float32)",
    )
    add_img_size(parser)
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--layers", action="store_true", help="show every distinct layer, too")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write all lines to this file")
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="rates recorded here count where they are higher; nothing is written (default: "
        "results)",
    )
