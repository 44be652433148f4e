"""The flags of `resfuse kernels` and `resfuse layers`."""

import argparse

from resfuse.bench.records.case import PRECISIONS, Options
from resfuse.bench.running.shared_flags import (
    MODEL_HELP,
    add_device,
    add_img_size,
    add_model_kwargs,
    add_precisions,
    add_results,
    add_threads,
    model_names,
    names,
    numbers,
    positive,
    rounds,
    whole,
)


def add_kernels(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure: y = relu(conv(x) + b), one by one")
    what.add_argument(
        "-m",
        "--model",
        type=model_names,
        default=["resnet50"],
        metavar="NAMES",
        help="networks whose convolutions are measured; wildcards allowed (default: resnet50)",
    )
    what.add_argument(
        "--providers",
        type=names,
        default=[],
        metavar="NAMES",
        help="ways to compute one; see `resfuse list providers` (default: all)",
    )
    what.add_argument(
        "-b",
        "--batch-size",
        type=numbers,
        default=[],
        metavar="N",
        help="images (default: 1,8 on a CPU, 1,256 on a GPU)",
    )
    add_precisions(what)
    add_img_size(what)
    add_model_kwargs(what)
    add_device(what)
    how = parser.add_argument_group("how")
    _add_rounds(how)
    how.add_argument(
        "--timeout",
        type=positive,
        default=Options.timeout_s,
        metavar="S",
        help="limit of a convolution, set-up included (default: %(default)g)",
    )
    add_threads(how)
    out = parser.add_argument_group("results")
    add_results(out)
    out.add_argument("--csv", action="store_true", help="print the rows as CSV, too")
    out.add_argument("--dry-run", action="store_true", help="show the convolutions and stop")
    out.add_argument("--no-report", action="store_true", help="append rows only")


def add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
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
    add_model_kwargs(parser)
    add_device(parser)
    _add_rounds(parser)
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
        default=Options.timeout_s,
        metavar="S",
        help="limit of a convolution or network, set-up included (default: %(default)g)",
    )
    add_threads(parser)
    add_results(parser)


def _add_rounds(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rounds",
        type=rounds,
        metavar="N",
        help="timed runs of each provider (default: 20 on a CPU, 100 on a GPU)",
    )
