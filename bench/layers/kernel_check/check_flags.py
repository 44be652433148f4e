"""The flags of `resfuse check`."""

import argparse

from resfuse.bench.running.shared_flags import (
    add_device,
    add_kernel,
    add_results,
    add_resume,
    names,
)


def add_check(parser: argparse.ArgumentParser) -> None:
    add_kernel(parser)
    parser.add_argument(
        "--math-mode",
        type=names,
        default=["*"],
        metavar="NAMES",
        help="ieee, tf32, fp16, bf16, int8; wildcards allowed (default: all)",
    )
    add_device(
        parser,
        "cuda, cuda:N, or cpu: tiny problems in Triton's interpreter (default: cuda where there is "
        "one)",
    )
    add_results(parser)
    add_resume(parser)
