"""The page's part on training fused and unfused: does a network learn the same either way?"""

from collections.abc import Mapping, Sequence

import numpy as np

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.agreement import (
    TEST_LOSS,
    TRAIN_LOSS,
    Agreement,
    agreement,
    apart,
    change,
    is_equal,
    seeds_apart,
    times_eager,
)
from resfuse.bench.report.data.experiments import Estimate, Experiment, estimate
from resfuse.bench.report.sections.trainings_section import (
    RECIPE,
    data_name,
    extent,
    failures,
    rows_from,
)
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.markdown import escape
from resfuse.bench.trainings.training_sheet import SHEET
from resfuse.bench.trainings.variants import EAGER, EXACT, TWINS, WAYS

STEPS = (2, 10, 100)  # in the table; 2 is the first with a backward pass behind it
SAME = (
    "The same seed means the same weights, images, order and crops. Two trainings that differ by "
    "nothing but rounding part within some dozen steps all the same; how fast float32's layers "
    "part from float64's is the measure for the others."
)
ON_A_CPU = (
    "On a CPU a fused model trains by torch's own layers, so that fused has to be eager exactly. "
    "twins runs the fused operations (in basic blocks conv_statistics and bn_add_relu; bn_conv1x1 "
    "has no place there) in plain torch, with the formulas of the kernels' backward passes: it "
    "tells whether those are right, and nothing of the kernels' own code."
)
MEANINGS = (
    "Losses are mean cross-entropies in nats. Errors and losses of finished networks are on "
    "unshifted images, each network tested in the way it was trained; means over seeds with 95 % "
    "intervals (Student's t), of which one in twenty misses by chance. Ways are compared at the "
    "same seed. The distance of two curves is the root mean square, over epochs, of the difference "
    "of their logarithms; it is given in distances between two seeds of eager. Quotients of losses "
    "are geometric means over epochs and seeds; differences by step are root mean squares over "
    "seeds."
)


def agreement_sections(
    experiments: Sequence[Experiment], images: Sequence[Mapping[str, str]]
) -> list[str]:
    """Returns the blocks for all experiments of an environment.

    Args:
        experiments: of one environment.
        images: for each of them, name in plot_agreement.PLOTS -> markdown of the image.
    """
    blocks = []
    for experiment, drawn in zip(experiments, images, strict=True):
        blocks += _section(experiment, drawn)
    return blocks


def verdicts(experiment: Experiment) -> list[str]:
    """Returns a sentence or two for each way compared with eager, except float64."""
    sentences = []
    for way in experiment.ways:
        if way in (EAGER, EXACT) or EAGER not in experiment.ways:
            continue
        curves = (
            "every loss while training is eager's, to the last digit kept"
            if is_equal(experiment, way)
            else _curves(*(agreement(experiment, way, curve) for curve in (TRAIN_LOSS, TEST_LOSS)))
        )
        sentences.append(
            f"{way}: {curves}. {_parting(times_eager(experiment, way))}"
            f"{_final(change(experiment, way, 'test_error_pct'))}"
        )
    return sentences


def _section(experiment: Experiment, images: Mapping[str, str]) -> list[str]:
    model = escape(experiment.trainings[0].model)
    blocks = [
        f"## Training fused and unfused: {model} on {data_name(experiment)}, "
        f"{markdown.count(experiment.epochs, 'epoch')}",
        " ".join([extent(experiment), SAME, RECIPE, MEANINGS, rows_from(experiment, SHEET)]),
    ]
    if experiment.finished:
        if TWINS in experiment.ways:
            blocks.append(ON_A_CPU)
        blocks.append("\n".join(f"- {sentence}" for sentence in verdicts(experiment)))
        blocks += [images.get("curves", ""), _finished(experiment), _differences(experiment)]
    return [block for block in [*blocks, *failures(experiment)] if block]


def _curves(found: Agreement | None, in_testing: Agreement | None) -> str:
    if found is None or in_testing is None:
        return "one seed has no spread to compare with"
    within = "agree within" if found.share <= 1 else "do not agree within"
    losses = [
        f"{cells.estimate(one.quotient)} of eager's in {where} "
        f"({'a difference' if _excludes(one.quotient, 1) else 'no difference shows'})"
        for one, where in ((found, "training"), (in_testing, "testing"))
    ]
    return (
        f"at the same seed its training curve is {cells.number(found.share)} times as far from "
        f"eager's as two seeds of eager are from each other: the curves {within} the spread of "
        f"seeds. Over all epochs its loss is {markdown.listing(losses)}"
    )


def _parting(times: float | None) -> str:
    if times is None or times == 1:
        return ""
    return (
        f"Over the first steps its loss is {cells.number(times)} times as far from "
        "float64's as eager's is (median). "
    )


def _final(found: Estimate | None) -> str:
    if found is None:
        return "No test error to compare."
    sentence = f"Test error at the same seed: {_signed(found)} points"
    if found.low is None or found.high is None:
        return f"{sentence}."
    return f"{sentence}: {'a difference' if _excludes(found, 0) else 'no difference shows'}."


def _finished(experiment: Experiment) -> str:
    titles = ["way", "what runs", "seeds", "training error, %", "test error, %", "training loss",
              "test loss"]  # fmt: skip
    rows = []
    for way in experiment.ways:
        trainings = experiment.run_as(way)
        means = (estimate(trainings, name) for name in ("train_loss", "test_loss"))
        rows.append([
            way,
            WAYS[way].does,
            str(len(trainings)),
            cells.estimate(estimate(trainings, "train_error_pct")),
            cells.estimate(estimate(trainings, "test_error_pct")),
            *(cells.number(mean.mean if mean else None) for mean in means),
        ])  # fmt: skip
    return markdown.table(titles, [False, False, *[True] * 5], rows)


def _differences(experiment: Experiment) -> str:
    """Returns the differences from eager over the epochs, and from the exact curve over the first
    steps."""
    reference = EXACT if EXACT in experiment.ways else EAGER
    titles = ["way", "distance from eager, training", "testing", "loss, of eager's, training",
              "testing", "largest difference, training, nats", "in epoch", "seeds there span, nats",
              *(f"from {reference} at step {step}, nats" for step in STEPS)]  # fmt: skip
    rows = []
    for way in experiment.ways:
        found = [agreement(experiment, way, name) for name in (TRAIN_LOSS, TEST_LOSS)]
        beside = found[0] if way != EAGER else None
        parting = apart(experiment, way, reference) if way != reference else np.array([])
        rows.append([
            way,
            *(cells.number(one.share if one and way != EAGER else None) for one in found),
            *(cells.estimate(one.quotient if one and way != EAGER else None) for one in found),
            cells.number(beside.largest if beside else None),
            str(beside.at) if beside and beside.largest else cells.EMPTY,
            cells.number(beside.spread if beside and beside.largest else None),
            *_at_steps(parting),
        ])  # fmt: skip
    seeds = seeds_apart(experiment, EAGER)
    if seeds.size:
        rows.append(["another seed", "1", "1", *[cells.EMPTY] * 5, *_at_steps(seeds)])
    return markdown.table(titles, [False, *[True] * 10], rows)


def _excludes(found: Estimate, value: float) -> bool:
    return found.low is not None and found.high is not None and not found.low <= value <= found.high


def _at_steps(line: np.ndarray) -> list[str]:
    return [cells.number(float(line[s - 1]) if s <= len(line) else None) for s in STEPS]


def _signed(found: Estimate) -> str:
    mean = f"{round(found.mean, 2) + 0.0:+.2f}"  # never -0.00
    if found.low is None or found.high is None:
        return f"{mean} (one seed)"
    return f"{mean} [{found.low:+.2f}, {found.high:+.2f}]"
