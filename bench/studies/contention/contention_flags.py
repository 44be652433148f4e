"""The flags of `resfuse study contention`."""

import argparse

from resfuse.bench.running.shared_flags import (
    add_results,
    add_threads,
    model_names,
    names,
    numbers,
    positive,
)
from resfuse.bench.studies.contention.scenarios import SCENARIOS


def add_contention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        type=model_names,
        default=["resnet50", "torchvision mobilenet_v2"],
        metavar="NAMES",
        help="networks of ours, of `resfuse study models --list`, or others (timm:resnet50d); "
        "wildcards allowed (default: resnet50,torchvision mobilenet_v2)",
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=numbers,
        default=[1, 8],
        metavar="N",
        help="images; several with commas (default: 1,8)",
    )
    parser.add_argument(
        "--backend",
        type=names,
        default=["eager", "compiled", "onnxrt", "openvino", "fused", "engine"],
        metavar="NAMES",
        help="default: eager,compiled,onnxrt,openvino,fused,engine",
    )
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
    parser.add_argument(
        "--seconds",
        type=positive,
        default=40.0,
        metavar="S",
        help="for a network, batch and scenario, all backends together (default: %(default)g)",
    )
    add_threads(parser)
    add_results(parser)
