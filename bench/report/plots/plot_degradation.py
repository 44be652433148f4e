"""The degradation study's plots: error against depth, training curves, gradients at the start."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from resfuse.bench.report.data.experiments import Experiment, estimate, stacked
from resfuse.bench.report.data.palette import NETWORK_LOOKS
from resfuse.bench.report.plots.figure import legend, panels, powers_of_ten
from resfuse.bench.report.plots.plot_agreement import epochs_axis
from resfuse.bench.report.sections.degradation_section import NAMES

ERRORS = {"train_error_pct": "training error, %", "test_error_pct": "test error, %"}
CURVES: dict[str, tuple[float, Literal["--", "-"]]] = {
    "train_error_by_epoch_pct": (0.9, "--"),
    "test_error_by_epoch_pct": (1.6, "-"),
}
GUESSING = 90.0  # percent wrong, of ten classes


def errors(experiment: Experiment) -> Figure | None:
    """Draws training and test error of the finished networks against depth: a dot for each seed, a
    line through the means with their 95 % intervals. Returns None where no training is finished."""
    if not experiment.finished:
        return None
    figure, ((left, right),) = panels(1, 2, row_height=3.2)
    for ax, (column, label) in zip((left, right), ERRORS.items(), strict=True):
        for network in experiment.networks:
            _against_depth(ax, experiment, network, column)
        ax.axhline(GUESSING, color="#888888", linewidth=0.8, linestyle=":")
        ax.annotate("guessing", (0.02, GUESSING + 1), xycoords=("axes fraction", "data"),
                    ha="left", va="bottom", color="#666666", fontsize=7.5)  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(experiment.depths))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([str(depth) for depth in experiment.depths])
        ax.set_ylim(-2, 100)
        ax.set_ylabel(label)
        ax.grid()
    figure.supxlabel(
        "depth, layers (means over seeds with 95 % intervals; dots: each seed)", fontsize=9
    )
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, label=NAMES[network])
        for network, look in NETWORK_LOOKS.items()
        if network in experiment.networks
    ]
    legend(figure, handles)
    return figure


def curves(experiment: Experiment) -> Figure | None:
    """Draws error over the epochs with a panel for each network, as figure 6 of the paper: means
    over seeds, training dashed, test solid."""
    if not experiment.finished:
        return None
    figure, axes = _by_network(experiment, 3.2)
    for ax, network in zip(axes, experiment.networks, strict=True):
        for depth, colour in _depth_colours(experiment).items():
            for column, (width, style) in CURVES.items():
                lines = stacked(experiment.of(network, depth), column)
                if not lines.size:
                    continue
                epochs = np.arange(1, lines.shape[1] + 1)
                ax.plot(epochs, lines.mean(0), color=colour, linewidth=width, linestyle=style)
        epochs_axis(ax, experiment.epochs)
        ax.set_ylim(0, 100)
    axes[0].set_ylabel("error, %")
    figure.supxlabel(
        "epoch (means over seeds; dotted: the learning rate is divided by ten)", fontsize=9
    )
    styles = [
        Line2D([], [], color="#3b3b3b", linewidth=width, linestyle=style, label=label)
        for (width, style), label in zip(CURVES.values(), ("training", "test"), strict=True)
    ]
    legend(figure, [*_depth_handles(experiment), *styles])
    return figure


def gradients(experiment: Experiment) -> Figure | None:
    """Draws the gradient's norm by layer before the first step, a panel for each network. Geometric
    means over seeds, and from the least to the most."""
    if not experiment.finished:
        return None
    figure, axes = _by_network(experiment, 3.2)
    for ax, network in zip(axes, experiment.networks, strict=True):
        for depth, colour in _depth_colours(experiment).items():
            lines = stacked(experiment.of(network, depth), "gradient_norm_by_layer")
            if not lines.size:
                continue
            layers = np.arange(1, lines.shape[1] + 1)
            with np.errstate(divide="ignore"):
                ax.plot(layers, np.exp(np.log(lines).mean(0)), color=colour, linewidth=1.3)
            ax.fill_between(
                layers, lines.min(0), lines.max(0), color=colour, alpha=0.2, linewidth=0
            )
        ax.set_yscale("log")
        powers_of_ten(ax.yaxis)
    axes[0].set_ylabel("norm of the loss's gradient by the weight")
    figure.supxlabel(
        "layer, from the input to the classifier (geometric means over seeds; bands: all of them)",
        fontsize=9,
    )
    legend(figure, _depth_handles(experiment))
    return figure


PLOTS: dict[str, tuple[Callable[[Experiment], Figure | None], str]] = {
    "errors": (errors, "Training and test error against depth, plain beside residual networks"),
    "curves": (curves, "Training and test error over the epochs, a line for each depth"),
    "gradients": (gradients, "Norm of the gradient by layer before the first step"),
}


def _against_depth(ax: Axes, experiment: Experiment, network: str, column: str) -> None:
    look = NETWORK_LOOKS[network]
    found = {d: e for d in experiment.depths if (e := estimate(experiment.of(network, d), column))}
    depths = list(found)
    means = [found[depth].mean for depth in depths]
    ax.plot(depths, means, color=look.colour, marker=look.marker, markersize=5, zorder=3)
    for depth, one in found.items():
        if one.low is not None and one.high is not None:
            reach = [[one.mean - one.low], [one.high - one.mean]]
            ax.errorbar(depth, one.mean, reach, color=look.colour, capsize=4, linewidth=1.2)
    for depth in depths:
        values = [t.numbers[column] for t in experiment.of(network, depth) if column in t.numbers]
        ax.plot([depth * 1.04] * len(values), values, ".", color=look.colour, markersize=3)


def _by_network(experiment: Experiment, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a panel for each network, side by side, on one scale."""
    figure, (axes,) = panels(1, len(experiment.networks), height)
    for ax, network in zip(axes, experiment.networks, strict=True):
        ax.sharey(axes[0])
        ax.set_title(NAMES[network])
        ax.grid()
        ax.tick_params(axis="y", labelleft=ax is axes[0])
    return figure, axes


def _depth_colours(experiment: Experiment) -> dict[int, str]:
    """Returns a colour for each depth, darker for deeper ones."""
    depths = experiment.depths
    shades = np.linspace(0.85, 0.0, len(depths)) if len(depths) > 1 else [0.3]
    return {d: to_hex(colormaps["viridis"](shade)) for d, shade in zip(depths, shades, strict=True)}


def _depth_handles(experiment: Experiment) -> list[Line2D]:
    colours = _depth_colours(experiment)
    return [Line2D([], [], color=colour, label=f"{d} layers") for d, colour in colours.items()]
