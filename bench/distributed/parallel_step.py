"""A training step whose gradients are averaged over processes: DDP, or FSDP2 (`fully_shard`).

Batch norm takes its statistics from each process's own images, as DDP leaves it. So the reference
of a check is the mean over processes of each one's fp64 gradients, which is what they compute.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from resfuse.bench.backends import backend
from resfuse.bench.measuring.clock.timing import Step
from resfuse.bench.measuring.training_step import Gradients, Run, Training, local
from resfuse.bench.records.case import Case


def spread(model: nn.Module, parallel: str) -> nn.Module:
    """Returns the model spread over the processes of the default group, with averaged gradients.

    Args:
        parallel: "ddp": every process keeps all weights. "fsdp": each keeps its share, and the
            blocks of a stage (children of a Sequential) and then the rest gather theirs in turn.
    """
    if parallel == "ddp":
        on_gpu = next(model.parameters()).is_cuda
        devices = [torch.cuda.current_device()] if on_gpu else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    # FSDP2 takes contiguous weights alone; convolutions lay them out by their images, every time.
    model.to(memory_format=torch.contiguous_format)
    for stage in model.children():
        if isinstance(stage, nn.Sequential):
            for block in stage:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(model)
    return model


class ParallelTraining(Training):
    """Training on all processes at once; every method is called by all of them, in one order."""

    def __init__(
        self,
        backend: str,
        memory_format: str,
        model: nn.Module,
        batches: Sequence[Tensor],
        case: Case,
    ) -> None:
        super().__init__(backend, memory_format, model, batches, case)
        self._backend, self._parallel = backend, case.parallel

    def make_module(self) -> Run:
        if backend(self._backend).takes_parallel:
            return self._make(spread(self._model, self._parallel), self._images)
        module = self._make(self._model, self._images)
        assert isinstance(module, nn.Module)
        return spread(module, self._parallel)

    def mean(self, found: Gradients) -> Gradients:
        row = found.row.clone()
        dist.all_reduce(row)
        return replace(found, row=row / dist.get_world_size())

    def first_weight(self) -> Tensor:
        return local(next(self._model.parameters()).detach())

    def timed(self) -> Step:
        return started_together(super().timed())


def started_together(step: Step) -> Step:
    """Returns the step with its clock started on all processes at once, after their preparation."""

    def prepare() -> None:
        step.prepare()
        dist.barrier()

    return replace(step, prepare=prepare)
