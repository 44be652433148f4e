"""The flags of `resfuse doctor`."""

import argparse
from pathlib import Path

from resfuse.bench.running.shared_flags import add_device


def add_doctor(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="where `resfuse bench` would write (default: results)",
    )
