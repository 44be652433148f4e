"""The flags of `resfuse study models`."""

import argparse

from resfuse.bench.records.case import USUAL_PRECISION
from resfuse.bench.running.shared_flags import (
    add_results,
    add_resume,
    model_names,
    names,
    numbers,
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
        help="fuse, engine: whether its answers are right; rows of both add up. speed: how fast "
        "all backends are, in turns (default: fuse,engine)",
    )
    parser.add_argument(
        "--img-size",
        type=rounds,
        metavar="N",
        help="pixels a side, more where a network needs them (default: 64, and 224 for speed)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=240.0,
        metavar="S",
        help="CPU seconds for one network, or seconds for one network, batch and all backends "
        "(default: %(default)g)",
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
    speed.add_argument(
        "--backend",
        type=names,
        default=["eager", "compiled", "onnxrt", "openvino", "fused", "engine"],
        metavar="NAMES",
        help="default: eager,compiled,onnxrt,openvino,fused,engine",
    )
    speed.add_argument(
        "--precision",
        default=USUAL_PRECISION,
        metavar="NAME",
        help="float32, or bf16: the same fp32 networks, computed in bfloat16 (default: "
        "%(default)s)",
    )
    speed.add_argument(
        "-b",
        "--batch-size",
        type=numbers,
        default=[1, 8],
        metavar="N",
        help="images; one batch size after the other (default: 1,8)",
    )
    speed.add_argument(
        "--seconds",
        type=positive,
        default=5.0,
        metavar="S",
        help="timed seconds for a network and batch, all backends together (default: %(default)g)",
    )
    speed.add_argument(
        "--budget",
        type=positive,
        default=float("inf"),
        metavar="S",
        help="seconds for all of it; --resume goes on where they ended (default: no limit)",
    )
    add_results(parser)
    add_resume(parser)
