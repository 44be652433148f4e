"""The roofline of networks as lines: by cut, and layer by layer; for the terminal and as CSV."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.table import Table

from resfuse.bench.common.errors import UsageError
from resfuse.bench.records.case import PRECISIONS
from resfuse.bench.report.data.cells import number
from resfuse.kernels.engine.cost.cuts import CUTS, kernel_cost, limit
from resfuse.kernels.engine.cost.gpus import Gpu
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node
from resfuse.kernels.engine.plan_table import name_of

ARITHMETIC = "arithmetic alone"


@dataclass(frozen=True)
class Subject:
    """A network at one batch size and precision."""

    model: str
    img_size: int  # pixels
    batch_size: int  # images
    precision: str
    graph: Graph

    @property
    def math_mode(self) -> str:
        return PRECISIONS[self.precision].math_mode


@dataclass(frozen=True)
class CutLine:
    """A network under one cut. GFLOP and MB (2**20 bytes) are an image's share."""

    model: str
    batch_size: int
    cut: str
    kernels: int | None
    gflop: float
    least_mb: float | None
    floor_ms: float
    images_per_s: float
    bound: str
    memory_pct: float  # of the floor, in kernels that wait for memory


@dataclass(frozen=True)
class LayerLine:
    """One distinct layer and how often it occurs; numbers are of one call, `share_pct` of all."""

    layer: str  # the first of them
    count: int
    gflop: float
    least_mb: float
    flop_per_byte: float
    floor_ms: float
    share_pct: float  # of conv by conv's floor
    bound: str


Line = CutLine | LayerLine
HEADINGS = {
    "model": "model", "batch_size": "batch", "cut": "cut", "kernels": "kernels", "gflop": "GFLOP",
    "least_mb": "MB", "floor_ms": "floor, ms", "images_per_s": "images/s", "bound": "bound by",
    "layer": "layer", "count": "count", "flop_per_byte": "FLOP/byte", "share_pct": "share, %",
}  # fmt: skip
WORDS = ("model", "cut", "layer", "bound")


def lines(subject: Subject, device: Gpu) -> list[CutLine]:
    """Returns a line for each cut, and one for the arithmetic alone."""
    n, mode = subject.batch_size, subject.math_mode
    found = []
    for name in CUTS:
        one = limit(subject.graph, name, device, mode)
        found.append(
            CutLine(
                subject.model, n, name, one.kernels, one.flops / n / 1e9, one.moved / n / 2**20,
                one.ms, 1e3 * n / one.ms, one.bound, 100 * one.memory_ms / one.ms,
            )
        )  # fmt: skip
    ms = device.ms(mode, one.flops, 0)
    gflop, rate = one.flops / n / 1e9, 1e3 * n / ms
    alone = CutLine(subject.model, n, ARITHMETIC, None, gflop, None, ms, rate, "FLOPs", 0.0)
    return [*found, alone]


def layer_lines(subject: Subject, device: Gpu) -> list[LayerLine]:
    """Returns every distinct layer with its epilogue, in the order they first run."""
    mode, total = subject.math_mode, limit(subject.graph, "conv by conv", device, subject.math_mode)
    alike: dict[str, list[Node]] = {}
    for node in subject.graph.nodes:
        alike.setdefault(_kind(subject.graph, node), []).append(node)
    found = []
    for nodes in alike.values():
        cost = kernel_cost(subject.graph, nodes[:1])
        ms = device.ms(mode, cost.flops, cost.moved)
        found.append(
            LayerLine(
                name_of(nodes[0]), len(nodes), cost.flops / 1e9, cost.moved / 2**20,
                cost.flops / cost.moved, ms, 100 * len(nodes) * ms / total.ms,
                device.bound(mode, cost.flops, cost.moved),
            )
        )  # fmt: skip
    return found


def _kind(graph: Graph, node: Node) -> str:
    """Returns a key that layers share which do the same on the same shapes."""
    shapes = [graph.values[name].shape for name in (*node.inputs, node.name)]
    what = node.op.problem if isinstance(node.op, Conv) else name_of(node)
    return f"{what} {shapes}"


def table(lines: Sequence[Line]) -> Table:
    """Returns a table of lines of one kind."""
    shown = Table(box=None, pad_edge=False)
    names = [field.name for field in fields(lines[0]) if field.name != "memory_pct"]
    for name in names:
        words = name in WORDS
        shown.add_column(HEADINGS[name], justify="left" if words else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*(_cell(line, name) for name in names))
    return shown


def write_csv(rows: Sequence[tuple[Gpu, bool, Subject]], file: Path, layers: bool) -> None:
    """Writes every line with its device and rates. With `layers` the lines of layers come first,
    whose GFLOP and MB are of one call; cells without a value stay empty.

    Args:
        rows: device, whether its rates are predicted, and subject.
    """
    columns = [
        "device", "rates", "source", "tflops", "gb_per_s", "precision", "math_mode", "img_size",
        "model", "batch_size", "layer", "cut", "kernels", "count", "gflop", "least_mb",
        "flop_per_byte", "floor_ms", "images_per_s", "share_pct", "bound", "memory_pct",
    ]  # fmt: skip
    try:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, columns, lineterminator="\n")
            writer.writeheader()
            for device, predicted, subject in rows:
                about = {
                    "device": device.name, "rates": "predicted" if predicted else "measured",
                    "source": device.source, "tflops": device.tflops[subject.math_mode],
                    "gb_per_s": 1e3 * device.tb_per_s, "precision": subject.precision,
                    "math_mode": subject.math_mode, "img_size": subject.img_size,
                    "model": subject.model, "batch_size": subject.batch_size,
                }  # fmt: skip
                every: list[Line] = [*lines(subject, device)]
                if layers:
                    every = [*layer_lines(subject, device), *every]
                writer.writerows({**about, **asdict(line)} for line in every)
    except OSError as error:
        raise UsageError(f"argument --csv: {file} cannot be written: {error.strerror}") from None


def _cell(line: Line, name: str) -> str:
    value = getattr(line, name)
    if name == "bound" and isinstance(line, CutLine):
        share = line.memory_pct if value == "bytes" else 100 - line.memory_pct
        return f"{value} {share:.0f} %"
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) else number(value)
