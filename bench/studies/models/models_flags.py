"""The flags of `resfuse study models`."""

import argparse

from resfuse.bench.records.case import USUAL_PRECISION
from resfuse.bench.running.shared_flags import (
    PEERS,
    add_backends,
    add_batch_sizes,
    add_budget,
    add_model_names,
    add_results,
    add_resume,
    add_seconds,
    add_timeout,
    names,
    rounds,
)


def add_models(parser: argparse.ArgumentParser) -> None:
    add_model_names(
        parser,
        "some of the study's networks, wildcards allowed ('timm rep*'), or others (timm:resnet50d)",
    )
    parser.add_argument("--list", action="store_true", help="show the networks and stop")
    parser.add_argument(
        "--kinds",
        type=names,
        default=["fuse", "engine"],
        metavar="NAMES",
        help="fuse, engine: whether its answers are right; rows of both add up. speed: how fast "
        "all backends are, in turns (default: fuse,engine)",
    )
    parser.add_argument(
        "--img-size",
        type=rounds,
        metavar="N",
        help="pixels a side, more where a network needs them (default: 64, and 224 for speed)",
    )
    add_timeout(
        parser,
        "CPU seconds for one network, or seconds for one network, batch and all backends "
        "(default: %(default)g)",
        240.0,
    )
    parser.add_argument(
        "-j",
        "--jobs",
        type=rounds,
        default=1,
        metavar="N",
        help="networks at a time, which share the CPU's cores (default: %(default)s)",
    )
    speed = parser.add_argument_group("speed")
    add_backends(speed, f"default: {','.join(PEERS)}", PEERS)
    speed.add_argument(
        "--precision",
        default=USUAL_PRECISION,
        metavar="NAME",
        help="float32; bf16 or int8: the same fp32 networks, computed in that; eager has no int8 "
        "and stays in fp32 (default: %(default)s)",
    )
    add_batch_sizes(speed, "images; one batch size after the other (default: 1,8)", [1, 8])
    add_seconds(
        speed,
        "timed seconds for a network and batch, all backends together (default: %(default)g)",
        5.0,
    )
    add_budget(speed, float("inf"), "no limit")
    add_results(parser)
    add_resume(parser)
