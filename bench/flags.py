"""What stands behind a flag (names, numbers), and the flags of the commands after `kernels`."""

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


def share(text: str) -> float:
    """5% is 0.05."""
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: percentages above 0%, such as 5%")
    return number


def pair(text: str) -> list[str]:
    found = names(text)
    if len(found) != 2 or "*" in text:
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: two backends, such as eager,fused")
    return found


def add_ab(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "--ab",
        type=pair,
        metavar="A,B",
        help="two backends against each other: A is the baseline; stops by --ci (default: 2%%)",
    )


def add_ci(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ci",
        type=share,
        metavar="P",
        help="stop a case once its speed-up's 95 %% interval is narrower than this, e.g. 2%%",
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
    add_results(parser)
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


def add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a network; see `resfuse list models`")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=whole,
        metavar="N",
        help="images (default: 8 on a CPU, 256 on a GPU)",
    )
    parser.add_argument("--precision", metavar="NAME", help=", ".join(PRECISIONS))
    parser.add_argument(
        "--providers",
        type=names,
        default=[],
        metavar="NAMES",
        help="ways to compute a convolution; see `resfuse list providers` (default: all)",
    )
    add_img_size(parser)
    add_device(parser)
    parser.add_argument(
        "--rounds",
        type=rounds,
        metavar="N",
        help="timed runs of each provider (default: 20 on a CPU, 100 on a GPU)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=2.0,
        metavar="S",
        help="timed seconds of each whole network (default: %(default)g)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=300.0,
        metavar="S",
        help="limit of a convolution or network, set-up included (default: %(default)g)",
    )
    add_threads(parser)
    add_results(parser)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="where `resfuse bench` would write (default: results)",
    )


def add_overhead(parser: argparse.ArgumentParser) -> None:
    add_results(parser)
    add_device(parser)


def add_gate(parser: argparse.ArgumentParser) -> None:
    add_overhead(parser)


def add_depth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        type=names,
        default=[],
        metavar="NAMES",
        help="some of the study's networks; wildcards allowed (cifar*)",
    )
    parser.add_argument(
        "--backend",
        type=names,
        default=[],
        metavar="NAMES",
        help="ways to run every network (default: eager, fused, engine; and compiled up to 56 "
        "layers)",
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=numbers,
        default=[],
        metavar="N",
        help="images (default: 8 small or 1 large one on a CPU, 128 or 32 on a GPU)",
    )
    parser.add_argument(
        "--precision", type=names, default=[], metavar="NAMES", help=", ".join(PRECISIONS)
    )
    add_device(parser)
    parser.add_argument(
        "--seconds",
        type=positive,
        default=1.0,
        metavar="S",
        help="timed seconds a case (default: %(default)g)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=240.0,
        metavar="S",
        help="limit of a case, set-up included (default: %(default)g)",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=840.0,
        metavar="S",
        help="seconds for all of it; --resume goes on where they ended (default: %(default)g)",
    )
    add_threads(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the seeded weights (default: 0)")
    parser.set_defaults(ab=None, ci=None)  # of `resfuse bench`, whose options these are, too
    add_results(parser)
    _add_resumable(parser, "cases")


def add_degradation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="digits",
        metavar="WHAT",
        help="digits (scikit-learn's, offline), download (CIFAR-10, by torchvision), or a folder "
        "with CIFAR-10's batches (default: digits)",
    )
    parser.add_argument(
        "--depths",
        type=numbers,
        default="20,32,44,56,110",
        metavar="N",
        help="layers, 6n + 2; several with commas (default: %(default)s)",
    )
    parser.add_argument(
        "--shortcuts",
        type=names,
        default=["A"],
        metavar="NAMES",
        help="of the residual networks: A pads with zeros, B projects where the shape changes, C "
        "in every block; A,B,C compares them (default: A)",
    )
    parser.add_argument(
        "--seeds", type=rounds, default=3, metavar="N", help="networks of each kind and depth "
        "(default: %(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--epochs",
        type=rounds,
        metavar="N",
        help="passes over the training images (default: 30 for digits, 164 for CIFAR-10)",
    )
    parser.add_argument(
        "--jobs",
        type=rounds,
        metavar="N",
        help="networks trained at once, each on one thread (default: one a CPU core, or 1 on a "
        "GPU)",
    )
    add_device(parser)
    parser.add_argument(
        "--timeout",
        type=positive,
        default=86400.0,
        metavar="S",
        help="limit of one training (default: a day)",
    )
    add_results(parser)
    _add_resumable(parser, "trainings")


def add_training_study(parser: argparse.ArgumentParser) -> None:
    add_degradation(parser)
    parser.set_defaults(depths="20", seeds=8)
    parser.add_argument(
        "--ways",
        type=names,
        default=[],
        metavar="NAMES",
        help="float64 and eager (the layers), fused (after fuse with training=True), twins (fused, "
        "each operation by its kernel's twin in plain torch, on a CPU); several with commas "
        "(default: all that differ on the device)",
    )


def add_results(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="a folder for this environment is made in it (default: results)",
    )


def _add_resumable(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what this environment and commit have already settled",
    )
    parser.add_argument("--dry-run", action="store_true", help=f"show the {what} and stop")
    parser.add_argument("--no-report", action="store_true", help="append rows only")


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
