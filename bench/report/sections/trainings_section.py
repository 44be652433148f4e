"""What the sections of all studies that train say: on what, how long, by which recipe."""

from resfuse.bench.records.sheet import Sheet
from resfuse.bench.report.data.experiments import Experiment
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.markdown import escape

DATA_NAMES = {
    "digits": "scikit-learn's digits (8x8 pixels)",
    "cifar10": "CIFAR-10 (32x32 pixels)",
}
RECIPE = (
    "The recipe is that of He et al. 2015 (arXiv:1512.03385), section 4.2: SGD with momentum 0.9, "
    "weight decay 1e-4, batch norm, no dropout, images shifted by up to an eighth of their side, "
    "the learning rate divided by ten after half and after three quarters of the time, a warm-up "
    "from 110 layers on."
)


def data_name(experiment: Experiment) -> str:
    return DATA_NAMES.get(experiment.data, escape(experiment.data))


def extent(experiment: Experiment) -> str:
    """Says how many trainings of what length there are, on how many images."""
    seeds = len({t.seed for t in experiment.trainings})
    sentence = (
        f"{markdown.count(len(experiment.finished), 'training')} of "
        f"{markdown.count(seeds, 'seed')}, batch {experiment.batch_size}, learning rate "
        f"{experiment.learning_rate:g}"
    )
    if not experiment.finished:
        return f"{sentence}."
    numbers = experiment.finished[0].numbers
    train, test = (numbers.get(name, 0) for name in ("train_images", "test_images"))
    return (
        f"{sentence}, {experiment.steps:,} steps, {train:.0f} images to train on and {test:.0f} to "
        "test on."
    )


def rows_from(experiment: Experiment, sheet: Sheet) -> str:
    commits = list(dict.fromkeys(escape(t.commit) for t in experiment.trainings))
    return f"Rows: {sheet.file}, commit {markdown.listing(commits)}."


def failures(experiment: Experiment) -> list[str]:
    """Returns a line for each training that failed."""
    several = len({t.way for t in experiment.trainings}) > 1
    return [
        f"{escape(t.model)}{f', {escape(t.way)}' if several else ''}, seed {t.seed}: {t.status}, "
        f"{escape(t.error)}"
        for t in experiment.trainings
        if t.status != "pass"
    ]
