"""Checks configurations of kernels in a subprocess, which one that crashes may take with it."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.subprocess_runner import run_task

TRIAL_TIMEOUT_S = 60.0  # of one configuration, compilation included
TASK = "resfuse.bench.layers.kernel_check.trials_process:trials_task"


def run_trials(
    kernels: Sequence[str],
    modes: Sequence[str],
    device: str,
    skip: Sequence[str],
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None],
) -> Outcome | None:
    """Checks configurations of kernels in a subprocess, which may leave off before the last, and
    may be silent for TRIAL_TIMEOUT_S.

    Args:
        skip: keys (kernels.judge.key) of those not to be tried.
        heard: told {"began": key} and {"key": ..., ...} as it happens, see kernels.judge.

    Returns:
        how the subprocess died, or None where it came to its end.

    Raises:
        KeyboardInterrupt: after the subprocess was killed.
    """
    payload = {
        "kernels": list(kernels),
        "modes": list(modes),
        "device": device,
        "skip": list(skip),
    }
    result = run_task(TASK, payload, timeout_s, heard, TRIAL_TIMEOUT_S)
    return result if isinstance(result, Outcome) else None


def trials_task(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Tries them, in the subprocess."""
    if job["device"].split(":")[0] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when kernels are first imported
    from resfuse.bench.layers.kernel_check.checker import run_trials as try_all

    skip = set(job["skip"])
    try_all(job["kernels"], job["modes"], job["device"], skip, lambda **c: tell("news", **c))
    return {}
