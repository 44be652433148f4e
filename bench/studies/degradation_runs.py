"""What the degradation study trains: networks with shortcuts, and a plain one of each depth."""

from collections.abc import Sequence

from resfuse.bench.common.selection import pick
from resfuse.bench.trainings.training_run import PLAIN, SHORTCUTS, Run, runs_of

DEPTHS = (20, 32, 44, 56, 110)  # the paper's, but for 1202


def plan(
    data: str,
    depths: Sequence[int],
    shortcuts: Sequence[str],
    seeds: int,
    epochs: int | None,
) -> list[Run]:
    """Returns every training asked for, in the order of `runs_of`.

    Args:
        depths: none for DEPTHS.
        shortcuts: of the residual networks; a plain one of each depth stands beside them.
        data, seeds, epochs: as `runs_of` takes them.

    Raises:
        UsageError: a depth no network has, an unknown shortcut.
    """
    options = pick("--shortcuts", shortcuts, SHORTCUTS)
    return runs_of(data, depths or DEPTHS, (PLAIN, *options), seeds, epochs)
