"""The quantization study's plot: the signal-to-noise ratio of each layer, by method."""

from math import isfinite
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from resfuse.bench.report.data.palette import looks
from resfuse.bench.report.data.quantized_networks import QuantizedNetwork
from resfuse.bench.report.plots.figure import legend, panels

METHODS = ("minmax", "percentile", "mse", "entropy")


def layers(network: QuantizedNetwork) -> Figure | None:
    """Draws the ratio of each layer quantised alone, from the first to the last, a line for each
    method of our engine; returns None where no layer was measured."""
    ways = [way for way in network.passed if way.layers]
    if not ways:
        return None
    # The colours of spare backends: a method is none, and has no colour of one.
    names = [*METHODS, *sorted({way.method for way in ways}.difference(METHODS))]
    found = looks(f"method {name}" for name in names)
    figure, ((ax,),) = panels(1, 1, 2.8)
    handles = []
    for way in sorted(ways, key=lambda way: names.index(way.method)):
        look = found[f"method {way.method}"]
        shown = [layer for layer in way.layers if isfinite(layer.sqnr_db)]
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linewidth": 1.2}
        ax.plot([one.depth for one in shown], [one.sqnr_db for one in shown], alpha=0.85, **style)
        handles.append(Line2D([], [], label=way.method, **style))
    ax.set_title(f"{network.model}: each layer quantised alone")
    ax.set_xlabel("layer, in the order of the network")
    ax.set_ylabel("SQNR, dB; higher is better")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid()
    legend(figure, handles)
    return figure


PLOTS = {"layers": (layers, "Signal-to-noise ratio of each layer in int8, by calibration method")}
