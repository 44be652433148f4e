"""A comparison's section: what follows what on the page, and which plots there are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from resfuse.bench.backends import stays_in_fp32
from resfuse.bench.report.data.ladder import EAGER
from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Comparison, Setting
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.break_even import break_even
from resfuse.bench.report.tables.depth import ceiling_sentence, depth_scaling
from resfuse.bench.report.tables.failures import failures
from resfuse.bench.report.tables.growth import growth_tables
from resfuse.bench.report.tables.headline import headline, noise
from resfuse.bench.report.tables.markdown import escape
from resfuse.bench.report.tables.training_phases import training_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODE_TITLES = {"inference": "Inference", "train": "Training"}


@dataclass(frozen=True)
class Plot:
    draw: Callable[[Comparison, dict[str, Look]], "Figure | None"]
    alt: str


def _by(name: str) -> Callable[[Comparison, dict[str, Look]], "Figure | None"]:
    """Returns the function of that name in plot_<name>.py, which is imported once something is
    drawn: a page can do without matplotlib."""

    def draw(comparison: Comparison, looks: dict[str, Look]) -> "Figure | None":
        module = import_module(f"resfuse.bench.report.plots.plot_{name}")
        drawn: Figure | None = getattr(module, name)(comparison, looks)
        return drawn

    return draw


GROWTH = "Time, memory and error against depth, plain beside residual networks"
PLOTS = {
    "speedup": Plot(
        _by("speedup"), "Speed-up of each backend over the baseline with its 95 % interval"
    ),
    "throughput": Plot(_by("throughput"), "Throughput of each backend in images per second"),
    "latency": Plot(_by("latency"), "Time of a batch against depth, a line for each backend"),
    "growth": Plot(_by("growth"), GROWTH),
    "roofline": Plot(
        _by("roofline"), "Achieved GFLOP/s against arithmetic intensity, under the measured roof"
    ),
}


GROWTH_TEXT = (
    "From the least to the greatest depth of each line: what a layer adds to the time of a batch, "
    "what twice the depth multiplies that time by, what 100 layers add to the peak memory, and the "
    "error against fp64 at both ends. ImageNet networks change their blocks between 34 and 50 "
    "layers, and 200 layers are the pre-activation network."
)


def section(comparison: Comparison, images: Mapping[str, str]) -> list[str]:
    """Returns the blocks of a section.

    Args:
        comparison: rows that may stand side by side.
        images: name in PLOTS -> markdown of the image, for the plots that could be drawn.
    """
    depths = depth_scaling(comparison)
    split = training_split(comparison)
    name = title(comparison.setting)
    beside = (
        ""
        if comparison.setting.baseline == EAGER
        else f", beside {escape(comparison.setting.baseline)}"
    )
    blocks = [f"## {name}{beside}", _introduction(comparison), noise(comparison)]
    blocks += [images.get("speedup", ""), *headline(comparison), images.get("throughput", "")]
    paid = break_even(comparison)
    if paid:
        blocks += ["### Break-even: when set-up is recovered", paid]
    if split:
        blocks += ["### Where a training step's time goes", split]
    if failed := failures(comparison.results):
        blocks += ["### Failures and unavailable backends", failed]
    if depths:
        blocks += ["### Depth scaling", ceiling_sentence(comparison), *depths]
        blocks.append(images.get("latency", ""))
    if grown := growth_tables(comparison):
        blocks += ["### What another layer costs, plain and residual", GROWTH_TEXT]
        blocks += [images.get("growth", ""), *grown]
    if "roofline" in images:
        blocks += [
            "### Roofline",
            "" if depths else ceiling_sentence(comparison),
            images["roofline"],
        ]
    return [block for block in blocks if block]


def title(setting: Setting) -> str:
    """Returns a title such as `Inference, float32 (ieee arithmetic)`."""
    mode = MODE_TITLES[setting.mode]
    together = (
        f" on {setting.world_size} processes ({escape(setting.parallel)})"
        if setting.parallel
        else ""
    )
    return f"{mode}{together}, {escape(setting.precision)} ({escape(setting.math_mode)} arithmetic)"


def _introduction(comparison: Comparison) -> str:
    setting = comparison.setting
    backend = setting.baseline.rpartition(" ")[0]
    in_fp32 = ", in fp32" * stays_in_fp32(backend, setting.precision)
    shared = (
        f"Baseline: {escape(setting.baseline)}{in_fp32}. Weights: {escape(setting.weights)}. "
        f"Images: {escape(setting.images)}. Device: {escape(setting.device_name)}."
    )
    if comparison.measured:
        return shared
    failed = markdown.count(len(comparison.results), "case")
    return f"{shared} There is no speed to show: none of {failed} passed."
