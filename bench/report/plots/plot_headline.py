"""The picture of README and REPORT.md: how many times faster than eager each backend runs one
network, a bar each."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.ladder import Line, Network
from resfuse.bench.report.data.palette import looks
from resfuse.bench.report.plots.figure import panels

MODEL = "resnet50"  # the one people compare by, where it was measured
NAMES = {
    "eager": "eager",
    "compiled": "torch.compile",
    "onnxrt": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "fused": "resfuse fuse",
    "engine": "resfuse engine",
}


def headline_network(found: Sequence[Network]) -> Network | None:
    """Returns the network of the picture: one in inference with ratios over eager in the same
    precision, preferably MODEL, then the one that most backends were measured on."""
    able = [n for n in found if n.setting.mode == "inference" and not n.setting.is_quantized]
    able = [n for n in able if bars(n)]
    return max(able, key=lambda n: (n.model == MODEL, len(n.lines)), default=None)


def bars(network: Network) -> dict[int, list[Line]]:
    """Returns, for the smallest and largest batch, the fastest memory format of each backend
    measured beside eager, slowest first; batches with nothing to compare are left out."""
    found = {}
    for batch in (network.batches[0], network.batches[-1]):
        best: dict[str, Line] = {}
        for line in network.at(batch):  # fastest first
            is_reference = "eager" in line.ratios and line.ratios["eager"] is None
            if "eager" in line.ratios and (is_reference or line.result.backend != "eager"):
                best.setdefault(line.result.backend, line)
        if len(best) > 1:
            found[batch] = sorted(best.values(), key=_times)
    return found


def headline(network: Network) -> Figure:
    """Draws a panel for the smallest and the largest batch, with a bar for each backend."""
    shown = bars(network)
    appearance = looks(line.result.backend for lines in shown.values() for line in lines)
    most = max(len(lines) for lines in shown.values())
    figure, ((*axes,),) = panels(1, len(shown), 0.36 * most + 0.6)
    right = max(_end(line) for lines in shown.values() for line in lines)
    for ax, (batch, lines) in zip(axes, shown.items(), strict=True):
        for i, line in enumerate(lines):
            backend, ratio = line.result.backend, line.ratios["eager"]
            ours = backend in ("fused", "engine")
            ax.barh(i, _times(line), height=0.7, color=appearance[backend].colour,
                    alpha=1.0 if ours else 0.55)  # fmt: skip
            if ratio is not None:
                ax.errorbar(
                    ratio.value, i, color="#3b3b3b", capsize=2.5, elinewidth=1,
                    xerr=[[ratio.value - ratio.low], [ratio.high - ratio.value]],
                )  # fmt: skip
            milliseconds = cells.number(line.result.numbers["p50_ms"])
            ax.text(_end(line), i, f"  {_times(line):.2f}x   {milliseconds} ms", va="center",
                    weight="bold" if ours else "normal")  # fmt: skip
        ax.set_yticks(
            range(len(lines)),
            [NAMES.get(name, name) for name in (line.result.backend for line in lines)],
        )
        ax.set_xlim(0, 1.55 * right)
        ax.set_title(f"{network.model}, {network.setting.precision}, batch {batch}")
        ax.tick_params(axis="y", length=0)
    figure.supxlabel(
        f"times faster than eager (median of paired rounds, 95 % interval) on "
        f"{network.setting.device_name}; higher is better",
        fontsize=9,
    )
    return figure


def _times(line: Line) -> float:
    ratio = line.ratios["eager"]
    return 1.0 if ratio is None else ratio.value


def _end(line: Line) -> float:
    ratio = line.ratios["eager"]
    return 1.0 if ratio is None else ratio.high
