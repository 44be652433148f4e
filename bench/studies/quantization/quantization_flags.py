"""The flags of `resfuse study quantization`."""

import argparse

from resfuse.bench.running.shared_flags import (
    add_img_size,
    add_model_names,
    add_results,
    add_resumable,
    add_seed,
    add_threads,
    add_weights,
    names,
    numbers,
    rounds,
)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    add_model_names(
        parser,
        "digits (ResNets trained here), mobilenet_v2, efficientnet_lite0, thin_resnet50 "
        "(`make real-weights`), or others with --weights or --pretrained (timm:resnet50d) or "
        "weights of their own (PATH.onnx); default: the first four, as far as installed",
    )
    add_weights(parser)
    add_img_size(parser)
    parser.add_argument(
        "--depths",
        type=numbers,
        default="20",
        metavar="N",
        help="layers of the ResNets trained on digits, 6n + 2 (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=rounds, metavar="N", help="of their training (default: 30)"
    )
    add_seed(parser, "of their training")
    parser.add_argument(
        "--method",
        type=names,
        default=["*"],
        metavar="NAMES",
        help="how our engine's ranges are chosen: minmax, percentile, mse, entropy (default: all); "
        "other tools have minmax, and compiled mse",
    )
    parser.add_argument(
        "--tool",
        type=names,
        default=["*"],
        metavar="NAMES",
        help="engine, openvino (NNCF), onnxrt (QDQ), compiled (PT2E); default: all",
    )
    parser.add_argument(
        "--images",
        default="bundled",
        metavar="DIR",
        help="photographs, for networks that take them: every second file is calibrated on, the "
        "others are measured (default: bundled)",
    )
    parser.add_argument(
        "--calibration",
        type=rounds,
        default=128,
        metavar="N",
        help="images that ranges are taken from (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=rounds,
        default=128,
        metavar="N",
        help="photographs measured; of digits all that were not trained on (default: %(default)s)",
    )
    add_threads(parser)
    add_results(parser)
    add_resumable(parser, "measurements")
