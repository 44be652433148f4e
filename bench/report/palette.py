"""What a backend looks like in every plot: a colour and a marker of its own.

The colours are Okabe and Ito's for colour-blind readers (jfly.uni-koeln.de/color), darkened where
they would vanish on white. The memory format is told by fill: contiguous is solid, any other
hollow, hatched and dashed.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str


LOOKS: dict[str, Look] = {
    "eager": Look("#3b3b3b", "o"),
    "compiled": Look("#0072b2", "s"),
    "compiled_max_autotune": Look("#56b4e9", "D"),
    "cudnn_fused": Look("#c9b400", "p"),
    "onnxrt": Look("#e69f00", "^"),
    "onnxrt_tensorrt": Look("#8c564b", "v"),
    "openvino": Look("#009e73", "P"),
    "tensorrt": Look("#cc79a7", "X"),
    "fused": Look("#d55e00", "*"),
    "engine": Look("#882255", "h"),
}
# For backends that are not in the table, in the order of their names.
SPARE = (
    Look("#332288", "<"),
    Look("#999933", ">"),
    Look("#44aa99", "d"),
    Look("#aa4499", "H"),
    Look("#661100", "8"),
    Look("#888888", "o"),
)
DARK_PAGE = "#15171a"


def backend_rank(backend: str) -> tuple[int, str]:
    """Sorts backends: those of the table in its order, then the others by name."""
    known = list(LOOKS)
    return (known.index(backend), "") if backend in LOOKS else (len(known), backend)


def looks(backends: Iterable[str]) -> dict[str, Look]:
    """backend -> its look, the same whatever else is on the page for every backend of the table."""
    unknown = sorted(set(backends) - LOOKS.keys())
    return LOOKS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(unknown)}


def on_dark(colour: str) -> str:
    """The colour mixed with white until it stands out from a dark page as WCAG asks of graphics,
    with room to spare (5:1; at least 3:1 is asked, w3.org/TR/WCAG21/#non-text-contrast)."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    for share in range(0, 101, 5):
        mixed = [round(c + (255 - c) * share / 100) for c in channels]
        lighter = "#" + "".join(f"{c:02x}" for c in mixed)
        if contrast(lighter, DARK_PAGE) >= 5:
            return lighter
    return "#ffffff"


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours by WCAG 2.1, from 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
