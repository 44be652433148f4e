"""Batch norm over processes, as torch.nn.SyncBatchNorm computes it: what a process tells the others
of its group, once a pass. Batches may differ in size, or be empty.

Forward: means, squared deviations and count of its batch, 2C + 1 numbers. They are gathered and not
added up, since Chan's formula needs each process's own; all merge them in the order of ranks, and
come to the same bits. Backward: the sums over g and g x^, [2 or 3, C], and the count, are added up;
a join of two norms does that once for both. Counts stay on the device, so the host waits for none.

The gradients of weight and bias are this process's alone, as torch's are:
DistributedDataParallel averages them like any other.

A group goes by its name, since it must pass through registered ops, and its collectives are called
within them: a compiler sees ops it need not know, and cannot part a collective from its pass. They
are torch's functional ones, which take a name and work with nccl and gloo alike; the public gather
into one tensor is being renamed (torch 2.14 warns of the old name, older ones lack the new).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import (
    Partials,
    launch_pack,
    merged_ref,
    unpacked,
)
from resfuse.kernels.gpu.batch_norm.reference import computes


def gather_statistics(partials: Partials, group: str) -> Partials:
    """Statistics of the batches of all processes, a part each, in the order of their ranks."""
    return unpacked(bn_gather_op(*partials, group))


@torch.library.custom_op("resfuse::bn_gather", mutates_args=())
def bn_gather_op(values: Tensor, counts: Tensor, group: str) -> Tensor:
    """[processes, 2C + 1]: the `Partials` of each as one part."""
    partials = Partials(values, counts)
    if computes(values):
        packed = values.new_empty(2 * values.shape[2] + 1)
        launch_pack(partials, packed).run()
    else:
        count, mean, m2 = merged_ref(partials)
        packed = torch.cat([mean, m2, count[None]])
    processes = _size(group)
    c10d = torch.ops._c10d_functional
    gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(packed, processes, group))
    return gathered.view(processes, -1)


@bn_gather_op.register_fake
def _fake_gather(values: Tensor, counts: Tensor, group: str) -> Tensor:
    return values.new_empty(_size(group), 2 * values.shape[2] + 1)


def _size(group: str) -> int:
    c10d: Any = dist.distributed_c10d  # whose names of groups are str to the interpreter alone
    return dist.get_world_size(c10d._resolve_process_group(group))


def sum_gradients(grads: Tensor, pixels: int, group: str) -> Tensor:
    """grads [rows, C] of all processes, added up; times this one's share of all pixels, so that who
    divides them by its own `pixels` has divided by everybody's."""
    told = torch.cat([grads.flatten(), grads.new_full((1,), pixels)])
    c10d = torch.ops._c10d_functional
    told = c10d.wait_tensor(c10d.all_reduce_(told, "sum", group))
    return (told[:-1] / (told[-1] / pixels)).view_as(grads)
