"""The flags of `resfuse study contention`."""

import argparse

from resfuse.bench.running.shared_flags import (
    PEERS,
    add_backends,
    add_batch_sizes,
    add_model_names,
    add_results,
    add_seconds,
    add_threads,
    names,
)
from resfuse.bench.studies.contention.scenarios import SCENARIOS


def add_contention(parser: argparse.ArgumentParser) -> None:
    add_model_names(
        parser,
        "networks of ours, of `resfuse study models --list`, or others (timm:resnet50d); "
        "wildcards allowed (default: resnet50,torchvision mobilenet_v2)",
        ["resnet50", "torchvision mobilenet_v2"],
    )
    add_batch_sizes(parser, "images; several with commas (default: 1,8)", [1, 8])
    add_backends(parser, f"default: {','.join(PEERS)}", PEERS)
    parser.add_argument(
        "--baseline",
        default="openvino",
        metavar="NAME",
        help="the backend that the others are compared with (default: openvino)",
    )
    parser.add_argument(
        "--scenario",
        type=names,
        default=["*"],
        metavar="NAMES",
        help=f"{', '.join(SCENARIOS)}: busy processes of that priority, or networks in threads; "
        "wildcards allowed (default: all)",
    )
    add_seconds(
        parser,
        "for a network, batch and scenario, all backends together (default: %(default)g)",
        40.0,
    )
    add_threads(parser)
    add_results(parser)
