"""The flags of `resfuse report`, `resfuse list` and `resfuse inspect`."""

import argparse
from pathlib import Path

from resfuse.bench.running.shared_flags import add_kernel, names

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


def add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=LISTED)
    parser.add_argument(
        "patterns", nargs="*", metavar="NAME", help="of models alone: wildcards allowed (resnet*)"
    )
    # Names after the option are its own: argparse has no more of the others to give by then.
    parser.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar=("SOURCE", "NAME"),
        help="whose models: resfuse, torchvision, timm, smp, PATH.py, package.module, PATH.pt2 "
        "(default: resfuse)",
    )


def add_inspect(parser: argparse.ArgumentParser) -> None:
    add_kernel(parser)
    parser.add_argument(
        "--target",
        type=names,
        default=[],
        metavar="NAMES",
        help="sm_80, sm_90, sm_100, gfx942 (default: the first three)",
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write every number to this file")
