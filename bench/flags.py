"""What stands behind a flag (names, numbers), and the flags of some commands."""

import argparse
from pathlib import Path

from resfuse.bench.case import PRECISIONS
from resfuse.bench.distributed.world import PARALLEL


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    return [whole(part) for part in names(text)]


def count(text: str) -> int:
    number = whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}; accepted: whole numbers from 0")
    return number


def rounds(text: str) -> int:
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; accepted: whole numbers from 1")
    return number


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: numbers above 0")
    return number


def add_parallel(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--parallel",
        choices=PARALLEL,
        help="how processes that torchrun has started share a training step; the batch is each "
        "one's (default: ddp)",
    )
    parser.set_defaults(world_size=0)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    jobs = parser.add_argument_group("jobs")
    jobs.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        required=True,
        help="slurm: a cluster's jobs; local: the same jobs on this machine, one after the other",
    )
    jobs.add_argument(
        "--shard", type=rounds, default=1, metavar="N", help="cases a job (default: %(default)s)"
    )
    jobs.add_argument("--partition", metavar="NAME", help="Slurm's (default: the cluster's)")
    jobs.add_argument("--account", metavar="NAME", help="who pays (default: the cluster's)")
    jobs.add_argument("--cpus", type=rounds, metavar="N", help="cores a job")
    jobs.add_argument("--gpus", type=rounds, metavar="N", help="GPUs a job; without, the CPU")
    jobs.add_argument(
        "--minutes",
        type=rounds,
        default=60,
        metavar="N",
        help="a job's time limit; one that reaches it is queued again (default: %(default)s)",
    )
    jobs.add_argument("--exclusive", action="store_true", help="no other job on the same machine")


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        type=names,
        default=["*"],
        metavar="NAMES",
        help="wildcards allowed (conv*; default: all)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cuda, cuda:N, or cpu: tiny problems in Triton's interpreter (default: cuda where "
        "there is one)",
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="a folder for this environment is made in it (default: results)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what this environment and commit have already settled",
    )


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
    parser.add_argument(
        "--img-size", type=int, metavar="PIXELS", help="square images (default: the network's own)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)"
    )
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
    parser.add_argument("--seed", type=int, default=0, help="of the seeded weights (default: 0)")


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
