"""The open questions about a GPU are asked in a subprocess, which the device may take with it."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.subprocess_runner import run_task

TASK = "resfuse.tools.gpu_plan.probe_process:probe_task"


def run_probe(
    device: str,
    skip: Sequence[str],
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None],
) -> Outcome | None:
    """Asks the open questions about a GPU in a subprocess (probe.py).

    Args:
        skip: names of questions not to be asked.
        heard: told {"began": name} and {"name": name, "answer": ...} as it happens.

    Returns:
        how the subprocess died, or None where it came to its end.
    """
    payload = {"device": device, "skip": list(skip)}
    result = run_task(TASK, payload, timeout_s, heard)
    return result if isinstance(result, Outcome) else None


def probe_task(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Asks them, in the subprocess."""
    if job["device"].split(":")[0] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from resfuse.tools.gpu_plan.probe import ask

    ask(job["device"], set(job["skip"]), lambda **content: tell("news", **content))
    return {}
