"""What the plan asks of the machine. The tests have one in which everything costs seconds of a
simulated clock."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resfuse.bench.backends import load
from resfuse.bench.layers.kernel_check.check_command import Heard, RunTrials
from resfuse.bench.layers.kernel_check.trials_process import run_trials
from resfuse.bench.measuring.clock import timing
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running import sweep
from resfuse.bench.running.subprocess_runner import run_case
from resfuse.bench.running.survey import survey
from resfuse.tools.gpu_plan.plan_progress import Clock
from resfuse.tools.gpu_plan.probe_process import run_probe

UNPACK_S = 60.0
# run_probe: device, questions to skip, seconds, heard
RunProbe = Callable[[str, Sequence[str], float, Heard], Outcome | None]


@dataclass(frozen=True)
class Means:
    """`unpack`: puts a carried archive of compiled kernels into a folder; says what came of it, and
    what subprocesses are to find in their environment."""

    clock: Clock
    survey: Callable[..., dict[str, Any]]
    measure: sweep.Measure
    trials: RunTrials
    probe: RunProbe
    unpack: Callable[[Path, Path], tuple[str, dict[str, str]]]


def real() -> Means:
    """This machine; its clock begins now."""
    watch = timing.Watch()
    return Means(
        lambda: timing.seconds(watch.elapsed()),
        survey,
        run_case,
        run_trials,
        run_probe,
        _unpack,
    )


def _unpack(archive: Path, to: Path) -> tuple[str, dict[str, str]]:
    """Unpacks in a process of its own, since that asks for the GPU's architecture.

    Raises:
        RuntimeError, Unavailable: it cannot be unpacked.
    """
    command = [
        sys.executable,
        "-m",
        "resfuse.tools.gpu_plan.carried",
        "unpack",
        str(archive),
        str(to),
    ]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            timeout=UNPACK_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not unpacked after {UNPACK_S:g} s") from None
    said = (done.stdout.strip().splitlines() or ["it says nothing"])[-1]
    if done.returncode:
        raise RuntimeError(said)
    return said, dict(load("resfuse.tools.gpu_plan.carried:environment")(to))
