"""The page's part on degradation: do deeper networks train worse, plain and residual?"""

from collections.abc import Mapping, Sequence
from statistics import geometric_mean

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.experiments import Estimate, Experiment, Training, estimate
from resfuse.bench.report.sections.trainings_section import (
    RECIPE,
    data_name,
    extent,
    failures,
    rows_from,
)
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.markdown import escape
from resfuse.bench.trainings.degradation_sheet import SHEET
from resfuse.bench.trainings.training_run import PLAIN

TRAIN, TEST = "train_error_pct", "test_error_pct"
FEW_STEPS = (
    "It is far shorter than the paper's 64,000 steps, whose learning rate began at 0.1. So the gap "
    "between plain and residual networks may be wider than the paper's: what a plain network has "
    "not learnt here it might learn with more time."
)
PAPER_STEPS = 64_000

NAMES = {
    "none": "plain",
    "A": "residual A (zeros)",
    "B": "residual B (projections)",
    "C": "residual C (projections everywhere)",
}


def degradation_sections(
    experiments: Sequence[Experiment], images: Sequence[Mapping[str, str]]
) -> list[str]:
    """Returns the blocks for all experiments of an environment.

    Args:
        experiments: of one environment.
        images: for each of them, name in plot_degradation.PLOTS -> markdown of the image.
    """
    blocks = []
    for experiment, drawn in zip(experiments, images, strict=True):
        blocks += _section(experiment, drawn)
    return blocks


def verdicts(experiment: Experiment, column: str = TRAIN) -> list[str]:
    """Returns a sentence for each network on its error from the least to the greatest depth, and
    one for each residual network on where it beats the plain one. Where intervals overlap they say
    so."""
    sentences = []
    for network in experiment.networks:
        depths = [d for d in experiment.depths if experiment.of(network, d)]
        first, last = (estimate(experiment.of(network, d), column) for d in (depths[0], depths[-1]))
        if first is None or last is None or len(depths) < 2:
            continue
        sentences.append(
            f"{_capital(NAMES[network])}: {_between(first, last)} from {depths[0]} to "
            f"{depths[-1]} layers: {cells.estimate(first)} and {cells.estimate(last)} %."
        )
    sentences += [_beats(experiment, n, column) for n in experiment.networks if n != PLAIN]
    return [sentence for sentence in sentences if sentence]


def _section(experiment: Experiment, images: Mapping[str, str]) -> list[str]:
    blocks = [
        f"## Degradation: {data_name(experiment)}, {markdown.count(experiment.epochs, 'epoch')}",
        _introduction(experiment),
    ]
    if experiment.finished:
        blocks += ["\n".join(f"- {sentence}" for sentence in verdicts(experiment))]
        blocks += [images.get("errors", ""), _table(experiment)]
        blocks += [images.get("curves", ""), images.get("gradients", "")]
    blocks += failures(experiment)
    return [block for block in blocks if block]


def _introduction(experiment: Experiment) -> str:
    sentences = [
        extent(experiment),
        RECIPE,
        "Errors are those of the finished networks on unshifted images, means over seeds with 95 % "
        "intervals (Student's t); two differ where the intervals do not overlap.",
        rows_from(experiment, SHEET),
    ]
    if 0 < experiment.steps < PAPER_STEPS / 2:
        sentences.insert(2, FEW_STEPS)
    return " ".join(sentences)


def _table(experiment: Experiment) -> str:
    titles = ["network", "shortcut", "depth", "parameters, M", "seeds", "training error, %",
              "test error, %", "training loss", "gradient, first / last convolution"]  # fmt: skip
    rows = []
    for network in experiment.networks:
        for depth in experiment.depths:
            trainings = experiment.of(network, depth)
            if trainings:
                rows.append(_cells(network, trainings))
    return markdown.table(titles, [False, False, *[True] * 7], rows)


def _cells(network: str, trainings: Sequence[Training]) -> list[str]:
    first = trainings[0]
    train, test = (estimate(trainings, column) for column in (TRAIN, TEST))
    losses = [t.numbers["train_loss"] for t in trainings if "train_loss" in t.numbers]
    return [
        escape(first.model),
        network,
        str(first.depth),
        f"{first.numbers.get('param_count', 0):.3f}",
        str(len(trainings)),
        cells.estimate(train),
        cells.estimate(test),
        cells.number(sum(losses) / len(losses) if losses else None),
        cells.number(_gradient_ratio(trainings)),
    ]


def _gradient_ratio(trainings: Sequence[Training]) -> float | None:
    """Returns the gradient's norm at the first convolution over that at the last one, before the
    first step; the geometric mean over seeds."""
    curves = [t.curves.get("gradient_norm_by_layer", ()) for t in trainings]
    ratios = [norms[0] / norms[-2] for norms in curves if len(norms) > 1 and min(norms) > 0]
    return geometric_mean(ratios) if ratios else None


def _between(first: Estimate, last: Estimate) -> str:
    if first.low is None or last.low is None:
        return "one seed cannot tell whether the training error rises"
    if last.above(first):
        return "training error rises"
    return "training error falls" if first.above(last) else "no difference in training error shows"


def _beats(experiment: Experiment, network: str, column: str) -> str:
    """Names the depths at which a residual network's error is below the plain one's."""
    better: list[str] = []
    equal: list[str] = []
    worse: list[str] = []
    for depth in experiment.depths:
        plain = estimate(experiment.of(PLAIN, depth), column)
        residual = estimate(experiment.of(network, depth), column)
        if plain and residual:
            side = better if plain.above(residual) else worse if residual.above(plain) else equal
            side.append(str(depth))
    parts = [
        f"{words} at {markdown.listing(depths)} layers"
        for words, depths in (
            ("below the plain network's", better),
            ("not to be told from it", equal),
            ("above it", worse),
        )
        if depths
    ]
    if not parts:
        return ""
    return f"{_capital(NAMES[network])}: training error {' and '.join(parts)}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
