"""The flags of `resfuse study overhead`, `gate`, `depth`, `degradation` and `training`."""

import argparse

from resfuse.bench.running.shared_flags import (
    add_backends,
    add_batch_sizes,
    add_budget,
    add_device,
    add_precisions,
    add_results,
    add_resumable,
    add_seconds,
    add_seed,
    add_threads,
    add_timeout,
    names,
    numbers,
    rounds,
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
    add_backends(
        parser,
        "ways to run every network (default: eager, fused, engine; and compiled up to 56 layers)",
    )
    add_batch_sizes(parser, "images (default: 8 small or 1 large one on a CPU, 128 or 32 on a GPU)")
    add_precisions(parser)
    add_device(parser)
    add_seconds(parser, "timed seconds a case (default: %(default)g)", 1.0)
    add_timeout(parser, default=240.0)
    add_budget(parser, 840.0, "%(default)g")
    add_threads(parser)
    add_seed(parser)
    parser.set_defaults(ab=None, ci=None)  # of `resfuse bench`, whose options these are, too
    add_results(parser)
    add_resumable(parser, "cases")


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
    add_timeout(parser, "limit of one training (default: a day)", 86400.0)
    add_results(parser)
    add_resumable(parser, "trainings")


def add_training(parser: argparse.ArgumentParser) -> None:
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
