"""A training of a study in a subprocess of its own, on one CPU thread (or on a GPU)."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.subprocess_runner import run_task
from resfuse.bench.trainings.training_run import Run

TASK = "resfuse.bench.studies.training_process:training_task"


def run_training(
    run: Run,
    source: str,
    device: str,
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None],
) -> Outcome:
    """Trains a network on one CPU thread (or on a GPU) in a subprocess, within the time limit.

    Args:
        source: as studies.learning.data.load takes it.
        heard: told {"share": 0 to 1} some times an epoch; what it raises ends the training.
    """
    payload = {"run": asdict(run), "source": source, "device": device}
    result = run_task(TASK, payload, timeout_s, heard)
    return result if isinstance(result, Outcome) else Outcome("pass", "", result["metrics"])


def training_task(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Trains it, in the subprocess."""
    import torch

    from resfuse.bench.trainings import data, recipe, training_row
    from resfuse.bench.trainings import training_run as run

    torch.set_num_threads(1)
    one = run.Run(**job["run"])
    loaded = data.load(job["source"])
    done = recipe.train(one, loaded, job["device"], lambda share: tell("news", share=share))
    return {"metrics": training_row.metrics(done, loaded)}
