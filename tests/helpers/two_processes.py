"""Run by torchrun in two processes: gradients of halves of a batch against those of all of it.

Batch norm is in eval mode, so that an image's gradient does not depend on its neighbours; with
statistics of each process's own images the two could not be equal.
"""

import os
import sys

import torch
import torch.distributed as dist

from resfuse.bench.distributed.parallel_step import spread
from resfuse.bench.measuring.training_step import gradients
from resfuse.resnet_ref import calibrate, create

IMAGES = 8


def main(parallel: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES)
    model = create("cifar_resnet20", seed=0)
    calibrate(model, images)
    whole = gradients(model.eval(), images, labels).row
    share = slice(rank * IMAGES // size, (rank + 1) * IMAGES // size)
    one = gradients(model, images[share], labels[share]).row
    together = spread(model, parallel)
    found = gradients(model, images[share], labels[share], through=together).row
    if rank == 0:
        print(f"apart {float((one - whole).norm() / whole.norm()):.3e}")
        print(f"together {float((found - whole).norm() / whole.norm()):.3e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1])
    sys.stdout.flush()
    # gloo's threads may still hold tensors, and one that frees them while the interpreter ends
    # aborts the process (pytorch/pytorch#179291).
    os._exit(0)
