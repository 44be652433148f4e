"""What a backend (or a kind of network) looks like in every plot: a colour and a marker of its own.

The colours are Okabe and Ito's for colour-blind readers (jfly.uni-koeln.de/color), darkened where
they would vanish on white. The memory format is told by fill: contiguous is solid, any other
hollow, hatched and dashed. On a dark page each has a lighter relative of its colour.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    colour: str  # on a light page, and in the PNGs
    marker: str  # of matplotlib
    dark: str  # on a dark page


LOOKS: dict[str, Look] = {
    "eager": Look("#3b3b3b", "o", "#c6c9ce"),
    "compiled": Look("#0072b2", "s", "#4f9be8"),
    "compiled_max_autotune": Look("#56b4e9", "D", "#8fd3f5"),
    "cudnn_fused": Look("#c9b400", "p", "#d8c62a"),
    "onnxrt": Look("#e69f00", "^", "#f0b23c"),
    "onnxrt_tensorrt": Look("#8c564b", "v", "#c59a8a"),
    "openvino": Look("#009e73", "P", "#2fc495"),
    "tensorrt": Look("#cc79a7", "X", "#eba0c8"),
    "fused": Look("#d55e00", "*", "#f5813a"),
    "engine": Look("#882255", "h", "#b58af2"),
}
# The networks of the degradation study by shortcut. Markers differ, too.
NETWORK_LOOKS: dict[str, Look] = {
    "none": Look("#d55e00", "o", "#f5813a"),
    "A": Look("#0072b2", "s", "#4f9be8"),
    "B": Look("#009e73", "^", "#2fc495"),
    "C": Look("#882255", "D", "#b58af2"),
}
# The ways of training a network (trainings/variants.py).
WAY_LOOKS: dict[str, Look] = {
    "float64": Look("#009e73", "P", "#2fc495"),
    "eager": Look("#3b3b3b", "o", "#c6c9ce"),
    "fused": Look("#d55e00", "*", "#f5813a"),
    "twins": Look("#0072b2", "s", "#4f9be8"),
}
# For backends that are not in the table, in the order of their names.
SPARE = (
    Look("#332288", "<", "#8f84e8"),
    Look("#999933", ">", "#b9b95a"),
    Look("#44aa99", "d", "#5cc9b7"),
    Look("#aa4499", "H", "#d67fc9"),
    Look("#661100", "8", "#d8765e"),
    Look("#888888", "o", "#9a9ea6"),
)


def backend_rank(backend: str) -> tuple[int, str]:
    """Sorts backends: those of the table in its order, then the others by name."""
    known = list(LOOKS)
    return (known.index(backend), "") if backend in LOOKS else (len(known), backend)


def looks(backends: Iterable[str]) -> dict[str, Look]:
    """Returns the look of each backend, which for known ones does not depend on the others."""
    unknown = sorted(set(backends) - LOOKS.keys())
    return LOOKS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(unknown)}
