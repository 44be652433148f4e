"""Flags that several commands share, word for word."""

import argparse
from pathlib import Path

from resfuse.bench.flags.flag_values import count, names
from resfuse.bench.records.case import PRECISIONS


def add_precisions(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--precision", type=names, default=[], metavar="NAMES", help=", ".join(PRECISIONS)
    )


def add_img_size(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--img-size", type=int, metavar="PIXELS", help="square images (default: the network's own)"
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)"
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--threads",
        type=count,
        default=0,
        metavar="N",
        help="CPU threads (default: torch's choice)",
    )


def add_seed(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the seeded weights (default: 0)")


def add_results(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="a folder for this environment is made in it (default: results)",
    )


def add_resume(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what this environment and commit have already settled",
    )


def add_resumable(parser: argparse._ActionsContainer, what: str) -> None:
    add_resume(parser)
    parser.add_argument("--dry-run", action="store_true", help=f"show the {what} and stop")
    parser.add_argument("--no-report", action="store_true", help="append rows only")
