"""Flags that several commands share, at most with another default and another help, and the types
that flags of any command take.

A flag of one command is in the `..._flags.py` beside that command. None of these files imports
torch, so that `resfuse --help` answers at once.

A type raises argparse.ArgumentTypeError; argparse puts the name of the flag in front.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resfuse.bench.records.case import MOST, PRECISIONS, Options

_MODELS = (
    "resnet50, timm:resnet50d, torchvision:mobilenet_v2, smp:Unet, PATH.py:FUNCTION, "
    "package.module:FUNCTION, PATH.pt2; see `resfuse list models --source NAME`"
)
MODELS_HELP = f"networks, wildcards allowed: {_MODELS}"
MODEL_HELP = f"a network: {_MODELS}"
PEERS = ("eager", "compiled", "onnxrt", "openvino", "fused", "engine")  # on a CPU


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def model_names(text: str) -> list[str]:
    """Comma-separated; a comma inside brackets belongs to an argument of a model."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def image_shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = map(int, text.replace("x", ",").split(","))
    except ValueError:
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: C,H,W, such as 3,224,224")
    return channels, height, width


def numbers(text: str) -> list[int]:
    return [whole(part) for part in names(text)]


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def count(text: str) -> int:
    number = whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}; accepted: whole numbers from 0")
    return number


def rounds(text: str) -> int:
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; accepted: whole numbers from 1")
    return number


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: numbers above 0")
    return number


def rate(text: str) -> float:
    """A number of queries a second; 0 stands for "max"."""
    if text == MOST:
        return 0.0
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: numbers above 0, max") from None


def share(text: str) -> float:
    """5% is 0.05."""
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: percentages above 0%, such as 5%")
    return number


def pair(text: str) -> list[str]:
    found = names(text)
    if len(found) != 2 or "*" in text:
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: two backends, such as eager,fused")
    return found


def add_model_names(
    parser: argparse._ActionsContainer, help: str = MODELS_HELP, default: Sequence[str] = ()
) -> None:
    parser.add_argument(
        "-m", "--model", type=model_names, default=list(default), metavar="NAMES", help=help
    )


def add_backends(
    parser: argparse._ActionsContainer, help: str, default: Sequence[str] = ()
) -> None:
    parser.add_argument("--backend", type=names, default=list(default), metavar="NAMES", help=help)


def add_batch_sizes(
    parser: argparse._ActionsContainer, help: str, default: Sequence[int] = ()
) -> None:
    parser.add_argument(
        "-b", "--batch-size", type=numbers, default=list(default), metavar="N", help=help
    )


def add_precisions(parser: argparse._ActionsContainer, help: str = ", ".join(PRECISIONS)) -> None:
    parser.add_argument("--precision", type=names, default=[], metavar="NAMES", help=help)


def add_seconds(
    parser: argparse._ActionsContainer, help: str, default: float | None = None
) -> None:
    parser.add_argument("--seconds", type=positive, default=default, metavar="S", help=help)


def add_timeout(
    parser: argparse._ActionsContainer,
    help: str = "limit of a case, set-up included (default: %(default)g)",
    default: float = Options.timeout_s,
) -> None:
    parser.add_argument("--timeout", type=positive, default=default, metavar="S", help=help)


def add_budget(parser: argparse._ActionsContainer, default: float, said: str) -> None:
    parser.add_argument(
        "--budget",
        type=positive,
        default=default,
        metavar="S",
        help=f"seconds for all of it; --resume goes on where they ended (default: {said})",
    )


def add_img_size(parser: argparse._ActionsContainer) -> None:
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--img-size", type=int, metavar="PIXELS", help="square images (default: the network's own)"
    )
    sizes.add_argument(
        "--input-shape",
        type=image_shape,
        metavar="C,H,W",
        help="of an image: 12,256,256; needed where nothing says what a model takes",
    )


def add_model_kwargs(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what models are built with: num_classes=10",
    )


def add_weights(parser: argparse._ActionsContainer) -> None:
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        default="seeded",
        metavar="FILE",
        help="safetensors or torch checkpoint (default: seeded, calibrated on photographs)",
    )
    weights.add_argument(
        "--pretrained",
        dest="weights",
        action="store_const",
        const="pretrained",
        help="published weights that are on this disk already; nothing is downloaded",
    )


def add_device(
    parser: argparse._ActionsContainer,
    help: str = "cpu, cuda, cuda:N (default: cuda where there is one)",
) -> None:
    parser.add_argument("--device", default="auto", help=help)


def add_threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--threads",
        type=count,
        default=0,
        metavar="N",
        help="CPU threads (default: torch's choice)",
    )


def add_seed(parser: argparse._ActionsContainer, what: str = "of the seeded weights") -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"{what} (default: 0)")


def add_results(
    parser: argparse._ActionsContainer,
    help: str = "a folder for this environment is made in it (default: results)",
) -> None:
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("results"), help=help)


def add_resume(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what this environment and commit have already settled",
    )


def add_resumable(parser: argparse._ActionsContainer, what: str) -> None:
    add_resume(parser)
    add_dry_run_and_no_report(parser, what)


def add_dry_run_and_no_report(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument("--dry-run", action="store_true", help=f"show the {what} and stop")
    parser.add_argument("--no-report", action="store_true", help="append rows only")


def add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        type=names,
        default=["*"],
        metavar="NAMES",
        help="wildcards allowed (conv*; default: all)",
    )
