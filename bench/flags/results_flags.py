"""What is already there, and nothing is measured: `resfuse report`, `compare`, `list`."""

import argparse
from pathlib import Path

from resfuse.bench.flags.flag_values import share

LISTED = ("models", "backends", "kernels", "providers", "metrics", "profiles")


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", metavar="DIR", nargs="+", type=Path, default=[Path("results")],
                        help="results folders, or a folder of them (default: results)")  # fmt: skip
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="one page over all the folders instead of two in each: HTML if FILE ends in .html, "
        "otherwise markdown with its plots beside it",
    )


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


def add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=LISTED)
