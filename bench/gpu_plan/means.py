"""What the plan asks of the machine. The tests have one in which everything costs seconds of a
simulated clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resfuse.bench import isolate, sweep, timing
from resfuse.bench.backends import load
from resfuse.bench.gpu_plan.progress import Clock
from resfuse.bench.kernels.check_command import Heard, RunTrials
from resfuse.bench.row import Outcome

# isolate.run_probe: device, questions to skip, seconds, heard
RunProbe = Callable[[str, Sequence[str], float, Heard], Outcome | None]


@dataclass(frozen=True)
class Means:
    """`unpack`: puts a carried archive of compiled kernels into a folder; says what came of it."""

    clock: Clock
    survey: Callable[..., dict[str, Any]]
    measure: sweep.Measure
    trials: RunTrials
    probe: RunProbe
    unpack: Callable[[Path, Path], str]


def real() -> Means:
    """This machine; its clock begins now."""
    watch = timing.Watch()
    return Means(
        lambda: timing.seconds(watch.elapsed()),
        isolate.survey,
        isolate.run_case,
        isolate.run_trials,
        isolate.run_probe,
        _unpack,
    )


def _unpack(archive: Path, to: Path) -> str:
    return str(load("resfuse.bench.gpu_plan.carried:unpack")(archive, to))
