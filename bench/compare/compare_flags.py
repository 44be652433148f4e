"""The flags of `resfuse compare`."""

import argparse
from pathlib import Path

from resfuse.bench.running.shared_flags import share


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "a", metavar="A", type=Path, help="rows.csv, or the results folder it lies in: before"
    )
    parser.add_argument("b", metavar="B", type=Path, help="the same: after")
    parser.add_argument(
        "--fail-above",
        type=share,
        default=0.05,
        metavar="P",
        help="a significant slowdown beyond this is a regression, exit code 1 (default: 5%%)",
    )
