"""The flags of `resfuse kernels` and `resfuse layers`."""

import argparse

from resfuse.bench.records.case import PRECISIONS
from resfuse.bench.running.shared_flags import (
    MODEL_HELP,
    add_batch_sizes,
    add_device,
    add_dry_run_and_no_report,
    add_img_size,
    add_model_kwargs,
    add_model_names,
    add_precisions,
    add_results,
    add_seconds,
    add_threads,
    add_timeout,
    names,
    rounds,
    whole,
)


def add_kernels(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure: y = relu(conv(x) + b), one by one")
    add_model_names(
        what,
        "networks whose convolutions are measured; wildcards allowed (default: resnet50)",
        ["resnet50"],
    )
    _add_providers(what, "one")
    add_batch_sizes(what, "images (default: 1,8 on a CPU, 1,256 on a GPU)")
    add_precisions(what)
    add_img_size(what)
    add_model_kwargs(what)
    add_device(what)
    how = parser.add_argument_group("how")
    _add_rounds(how)
    add_timeout(how, "limit of a convolution, set-up included (default: %(default)g)")
    add_threads(how)
    out = parser.add_argument_group("results")
    add_results(out)
    out.add_argument("--csv", action="store_true", help="print the rows as CSV, too")
    add_dry_run_and_no_report(out, "convolutions")


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
    _add_providers(parser, "a convolution")
    add_img_size(parser)
    add_model_kwargs(parser)
    add_device(parser)
    _add_rounds(parser)
    add_seconds(parser, "timed seconds of each whole network (default: %(default)g)", 2.0)
    add_timeout(parser, "limit of a convolution or network, set-up included (default: %(default)g)")
    add_threads(parser)
    add_results(parser)


def _add_providers(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument(
        "--providers",
        type=names,
        default=[],
        metavar="NAMES",
        help=f"ways to compute {what}; see `resfuse list providers` (default: all)",
    )


def _add_rounds(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rounds",
        type=rounds,
        metavar="N",
        help="timed runs of each provider (default: 20 on a CPU, 100 on a GPU)",
    )
