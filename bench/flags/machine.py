"""What there is to do on this machine: `resfuse doctor`, `gpu-plan`."""

import argparse
from pathlib import Path

from resfuse.bench.flags.shared import add_device
from resfuse.bench.flags.values import names, positive


def add_doctor(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="where `resfuse bench` would write (default: results)",
    )


def add_gpu_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="show the steps and stop")
    parser.add_argument(
        "--steps",
        type=names,
        default=["*"],
        metavar="NAMES",
        help="some of them; wildcards allowed (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=540.0,
        metavar="S",
        help="seconds for all of it; each step's bound grows with it (default: %(default)g)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="skip steps and cases that are already done"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run every step for real on the CPU, on a tiny network",
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        help="a folder for this environment is made in it (default: results; with --dry-run a "
        "temporary one)",
    )
