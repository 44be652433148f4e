"""LAUNCHERS: where the jobs of a sweep run, and how their state is found out."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from resfuse.bench.common.errors import UsageError

MOST_PREEMPTIONS = 100  # of one job by its own time limit; each time it has got further
NOTICE_S = 60  # before its time is up, a job is told
QUERY_S = 60
SLURM = ("sbatch", "squeue", "scontrol", "scancel")
# squeue's names for what goes on; a job it does not know, or calls anything else, has ended.
ALIVE = frozenset(
    ("PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING",
     "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "PREEMPTED",
     "RESV_DEL_HOLD")
)  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """The resources of a job; None leaves a value to the cluster."""

    minutes: int
    partition: str | None = None
    account: str | None = None
    cpus: int | None = None
    gpus: int | None = None
    exclusive: bool = False


@dataclass(frozen=True)
class Launcher:
    """A way to run jobs, of which `at_once` may run side by side without slowing each other
    down."""

    require: Callable[[], None]
    executor: Callable[[Path, Resources], Any]
    ended: Callable[[Any], bool]
    at_once: float


def require_submitit() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise UsageError(
            "resfuse sweep needs the package submitit, which is not installed: "
            "pip install 'resfuse[cluster]'"
        )


def _require_slurm() -> None:
    missing = [command for command in SLURM if shutil.which(command) is None]
    if missing:
        raise UsageError(
            f"argument --launcher: slurm needs Slurm's commands, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not on this machine; accepted here: local"
        )
    try:
        asked = subprocess.run(
            ["scontrol", "ping"], capture_output=True, text=True, timeout=QUERY_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"argument --launcher: Slurm's controller did not answer within {QUERY_S} s"
        ) from None
    said = " ".join((asked.stdout + asked.stderr).split())
    if asked.returncode != 0 or " is UP" not in said:
        raise UsageError(f"argument --launcher: Slurm's controller does not answer: {said[:250]}")


def _slurm(folder: Path, wanted: Resources) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    executor = SlurmExecutor(folder, max_num_timeout=MOST_PREEMPTIONS)
    asked = {
        "time": wanted.minutes,
        "partition": wanted.partition,
        "account": wanted.account,
        "cpus_per_task": wanted.cpus,
        "gpus_per_node": wanted.gpus,
        "exclusive": wanted.exclusive or None,
        "signal_delay_s": NOTICE_S,
        "job_name": "resfuse",
        # Slurm's own preemption, too, puts the job back into the queue.
        "additional_parameters": {"requeue": True},
    }
    executor.update_parameters(**{key: value for key, value in asked.items() if value is not None})
    return executor


def _slurm_ended(job: Any) -> bool:
    """Returns whether a job has ended, from squeue: sacct, which submitit asks, needs a database
    that smaller clusters do not have."""
    if job.paths.result_pickle.exists():
        return True
    command = [
        "squeue", "--noheader", "--format=%T", "--states=all", f"--jobs={job.job_id}"
    ]  # fmt: skip
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=QUERY_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:
        return False  # the controller is away for a moment
    return not set(asked.stdout.split()) & ALIVE


def _require_nothing() -> None:
    pass


def _local(folder: Path, wanted: Resources) -> Any:
    import torch
    from submitit.local.local import LocalExecutor

    executor = LocalExecutor(folder, max_num_timeout=MOST_PREEMPTIONS)
    # submitit shows its jobs only the GPUs it is told of, by number.
    masked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [int(part) for part in masked.split(",") if part.isdigit()]
    gpus = gpus or list(range(torch.cuda.device_count()))
    executor.update_parameters(
        timeout_min=wanted.minutes,
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
        signal_delay_s=NOTICE_S,
    )
    return executor


LAUNCHERS = {
    # One after the other: two jobs on one machine would measure each other.
    "local": Launcher(_require_nothing, _local, lambda job: job.done(), 1),
    "slurm": Launcher(_require_slurm, _slurm, _slurm_ended, inf),
}
