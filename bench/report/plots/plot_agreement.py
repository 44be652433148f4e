"""The training study's plot: loss curves of all ways over each other, and how fast they part."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from resfuse.bench.report.data.agreement import TEST_LOSS, TRAIN_LOSS, apart, seeds_apart
from resfuse.bench.report.data.experiments import Experiment, stacked
from resfuse.bench.report.data.palette import WAY_LOOKS
from resfuse.bench.report.plots.figure import legend, panels, powers_of_ten
from resfuse.bench.trainings.variants import EAGER, EXACT

DROPS = (0.5, 0.75)  # of the epochs, where the learning rate is divided
# fused may equal eager, and is thinner and broken, so that what is below it is seen between.
STROKES: dict[str, tuple[float, tuple[float, tuple[float, ...]]]] = {
    "float64": (2.6, (0, ())),
    "eager": (1.9, (0, ())),
    "fused": (1.4, (0, (4.0, 4.0))),
    "twins": (1.4, (0, (6.0, 1.2, 1.2, 1.2))),
}
SEEDS = "#999999"
WIDE = 10  # from the least loss to the most, from where on an axis is logarithmic


def curves(experiment: Experiment) -> Figure | None:
    """Draws loss over the epochs, and the difference at the same seed over the first steps, as
    means over seeds; returns None where no training is finished."""
    if not experiment.finished:
        return None
    figure, ((training, testing, parting),) = panels(1, 3, 3.2)
    for ax, curve, title in (
        (training, TRAIN_LOSS, "loss while training"),
        (testing, TEST_LOSS, "loss on test images"),
    ):
        _by_epoch(ax, experiment, curve)
        ax.set_title(title)
        ax.set_xlabel("epoch (dotted: rate divided by ten)")
    training.set_ylabel("mean cross-entropy, nats")
    _parting(parting, experiment)
    legend(figure, _handles(experiment))
    return figure


PLOTS = {
    "curves": (
        curves,
        "Loss over the epochs for each way of training, and their difference over the first steps",
    )
}


def epochs_axis(ax: Axes, epochs: int) -> None:
    """Draws the axis from the first epoch to the last, with marks where the learning rate drops."""
    for drop in DROPS:
        ax.axvline(drop * epochs + 0.5, color="#888888", linewidth=0.8, linestyle=":")
    ax.set_xlim(1, max(2, epochs))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _by_epoch(ax: Axes, experiment: Experiment, curve: str) -> None:
    """Draws lines of means over bands from the least to the greatest value of the seeds."""
    for way in experiment.ways:
        lines = stacked(experiment.run_as(way), curve)
        if not lines.size:
            continue
        epochs = np.arange(1, lines.shape[1] + 1)
        colour = WAY_LOOKS[way].colour
        ax.fill_between(epochs, lines.min(0), lines.max(0), color=colour, alpha=0.13, linewidth=0)
        _line(ax, epochs, lines.mean(0), way)
    if ax.dataLim.y1 > WIDE * ax.dataLim.y0 > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    epochs_axis(ax, experiment.epochs)
    ax.grid()


def _parting(ax: Axes, experiment: Experiment) -> None:
    """Draws the difference from float64, or without it from eager, by step."""
    reference = EXACT if EXACT in experiment.ways else EAGER
    for way in experiment.ways:
        line = apart(experiment, way, reference)
        if way != reference and line.any():
            line = np.where(line > 0, line, np.nan)
            _line(ax, np.arange(1, len(line) + 1), line, way)
    seeds = seeds_apart(experiment, EAGER)
    if seeds.size:
        ax.plot(np.arange(1, len(seeds) + 1), seeds, color=SEEDS, linewidth=1.2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    powers_of_ten(ax.yaxis)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_title(f"loss: difference from {reference}")
    ax.set_xlabel("step")
    ax.set_ylabel("at the same seed, nats (root mean square)")
    ax.grid()


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, way: str) -> None:
    width, dashes = STROKES[way]
    ax.plot(x, y, color=WAY_LOOKS[way].colour, linewidth=width, linestyle=dashes)


def _handles(experiment: Experiment) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = []
    for way in experiment.ways:
        width, dashes = STROKES[way]
        look = WAY_LOOKS[way]
        handles.append(Line2D([], [], color=look.colour, linewidth=width, linestyle=dashes,
                              label=way))  # fmt: skip
    if len({t.seed for t in experiment.finished}) > 1:
        handles.append(Patch(color=SEEDS, alpha=0.3, linewidth=0, label="band: all seeds"))
    if seeds_apart(experiment, EAGER).size:
        label = "difference between seeds of eager"
        handles.append(Line2D([], [], color=SEEDS, linewidth=1.2, label=label))
    return handles
