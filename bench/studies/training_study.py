"""`resfuse study training`: does a network that is trained fused learn as it does unfused?

The same networks from the same seeds, on the same images in the same order, each run in several
ways (learning/ways.py). Rounding alone makes two trainings part after some dozen steps, whatever
computed them; so the answer is in how fast a way parts from float64, beside eager, and in whether
its curve is closer to eager's of the same seed than another seed's is.
"""

import argparse
from collections.abc import Sequence

from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick
from resfuse.bench.studies.training_session import kind_of, study
from resfuse.bench.trainings.training_run import SHORTCUTS, Run, runs_of
from resfuse.bench.trainings.training_sheet import SHEET
from resfuse.bench.trainings.variants import TWINS, WAYS

DEPTHS = (20,)


def run(args: argparse.Namespace) -> int:
    """Trains what has not been trained yet; returns 1 if a training failed."""
    shortcuts = pick("--shortcuts", args.shortcuts, SHORTCUTS)
    ways = pick("--ways", args.ways or list(WAYS), list(WAYS))
    depths = args.depths or DEPTHS
    runs = runs_of(kind_of(args.data), depths, shortcuts, args.seeds, args.epochs, ways)
    return study(args, lambda device: runs_on(device, runs, args.ways), SHEET)


def runs_on(device: str, runs: Sequence[Run], asked: Sequence[str]) -> Sequence[Run]:
    """Leaves out the twins on a GPU, where `fused` runs the kernels themselves.

    Args:
        asked: what `--ways` says; nothing for what suits the device.

    Raises:
        UsageError: the twins were asked for by name on a GPU.
    """
    if device == "cpu":
        return runs
    if TWINS in asked:
        raise UsageError(
            f"argument --ways: {TWINS} on {device}, where fused runs the kernels themselves; "
            f"accepted there: {', '.join(way for way in WAYS if way != TWINS)}"
        )
    return [one for one in runs if one.way != TWINS]
