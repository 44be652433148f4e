"""What a backend (or a kind of network) looks like in every plot: a colour and a marker of its own.

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
# The networks of the degradation study by shortcut. Markers differ, too.
NETWORK_LOOKS: dict[str, Look] = {
    "none": Look("#d55e00", "o"),
    "A": Look("#0072b2", "s"),
    "B": Look("#009e73", "^"),
    "C": Look("#882255", "D"),
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


def backend_rank(backend: str) -> tuple[int, str]:
    """Sorts backends: those of the table in its order, then the others by name."""
    known = list(LOOKS)
    return (known.index(backend), "") if backend in LOOKS else (len(known), backend)


def looks(backends: Iterable[str]) -> dict[str, Look]:
    """backend -> its look, the same whatever else is on the page for every backend of the table."""
    unknown = sorted(set(backends) - LOOKS.keys())
    return LOOKS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(unknown)}
