"""The flags of `resfuse study models`."""

import argparse

from resfuse.bench.running.shared_flags import (
    add_results,
    add_resume,
    model_names,
    names,
    positive,
    rounds,
)


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        type=model_names,
        default=[],
        metavar="NAMES",
        help="some of the study's networks, wildcards allowed ('timm rep*'), or others "
        "(timm:resnet50d)",
    )
    parser.add_argument("--list", action="store_true", help="show the networks and stop")
    parser.add_argument(
        "--kinds",
        type=names,
        default=["fuse", "engine"],
        metavar="NAMES",
        help="fuse or engine: one of them alone; rows of both add up (default: fuse,engine)",
    )
    parser.add_argument(
        "--img-size",
        type=rounds,
        default=64,
        metavar="N",
        help="pixels a side, more where a network needs them (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=240.0,
        metavar="S",
        help="CPU seconds for one network (default: %(default)g)",
    )
    parser.add_argument(
        "-j",
        "--jobs",
        type=rounds,
        default=1,
        metavar="N",
        help="networks at a time, which share the CPU's cores (default: %(default)s)",
    )
    add_results(parser)
    add_resume(parser)
