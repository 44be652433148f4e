"""Which of how many processes this is, as torchrun tells it. It imports no torch, for `--help`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from resfuse.bench.common.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int  # on this machine
    local_size: int
    address: str
    port: int
    launcher_store: bool  # torchrun holds the store itself, so that it outlives every process
    attempt: str  # torchrun may start all processes again

    @property
    def leads(self) -> bool:
        return self.rank == 0


def launched(environment: Mapping[str, str]) -> bool:
    """Returns whether torchrun, or a launcher with its variables, has started this process."""
    return "MASTER_ADDR" in environment and all(name in environment for name in VARIABLES)


def world_of(environment: Mapping[str, str]) -> World:
    """Raises UsageError where the launcher's variables make no sense."""
    number = {name: environment[name] for name in VARIABLES}
    number["LOCAL_WORLD_SIZE"] = environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])
    for name, value in number.items():
        if not value.isdigit():
            raise UsageError(f"environment variable {name}: '{value}'; accepted: whole numbers")
    rank, size = int(number["RANK"]), int(number["WORLD_SIZE"])
    if rank >= size:
        raise UsageError(f"environment variable RANK: {rank}; accepted: 0 to {size - 1}")
    return World(
        rank,
        size,
        int(number["LOCAL_RANK"]),
        int(number["LOCAL_WORLD_SIZE"]),
        environment["MASTER_ADDR"],
        int(number["MASTER_PORT"]),
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def require_devices(device: str, processes: int) -> None:
    """Raises UsageError unless there is a GPU, or a core, for each process.

    Args:
        device: "cpu" or "cuda".
        processes: on this machine.

    Raises:
        UsageError: there are fewer.
    """
    if device == "cuda":
        import torch

        found, what = torch.cuda.device_count(), "CUDA device"
    else:
        found, what = len(os.sched_getaffinity(0)), "core"
    if found < processes:
        here = f"{found} {what}" if found == 1 else f"{found} {what}s"
        raise UsageError(
            f"argument --nproc-per-node: {processes} processes on a machine with {here}; "
            f"accepted: 1 to {found}"
        )
