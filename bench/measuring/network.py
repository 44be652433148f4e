"""Makes the network of a case: the same weights and statistics in every process."""

from pathlib import Path

import torch
from torch import nn

from resfuse.bench.measuring import photographs as inputs
from resfuse.bench.records.case import PRECISIONS, Case
from resfuse.resnet_ref import calibrate, create, load_pretrained, load_weights, shrink_branches

CALIBRATION_IMAGES = 16
CALIBRATION_SEED = 1000  # none of the measured batches
RANK_SEEDS = 10_000  # from one process's batches to the next one's
TIMED_BATCHES = 2  # the clock sees these; one more batch is kept back until it has stopped
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def master(case: Case, seed: int) -> nn.Module:
    """The network in eval mode, in the case's precision, on its device, contiguous.

    Seeded weights are made to behave like trained ones: residual branches that add little
    (`shrink_branches`) and batch-norm statistics from photographs (`calibrate`). As they are drawn,
    a deep network's rounding errors grow until any tolerance would let another image's answer pass.
    """
    model = create(case.model, seed=seed)
    if case.weights == "seeded":
        photographs = inputs.batch(case.images, CALIBRATION_IMAGES, case.img_size, CALIBRATION_SEED)
        shrink_branches(model)
        calibrate(model, photographs)
    elif case.weights == "pretrained":
        load_pretrained(case.model, model)
    else:
        load_weights(model, Path(case.weights))
    return model.eval().to(case.device, dtype(case))


def dtype(case: Case) -> torch.dtype:
    found = getattr(torch, PRECISIONS[case.precision].dtype)
    assert isinstance(found, torch.dtype)
    return found


def batches(case: Case, rank: int = 0) -> list[torch.Tensor]:
    """A case's batches [N, 3, H, W], on its device: the timed ones, and one for afterwards.

    Args:
        rank: of the process; each has images of its own.
    """
    made = (
        inputs.batch(case.images, case.batch_size, case.img_size, RANK_SEEDS * rank + seed)
        for seed in range(TIMED_BATCHES + 1)
    )
    return [images.to(case.device, dtype(case)) for images in made]


def in_format(model: nn.Module, memory_format: str) -> nn.Module:
    return model.to(memory_format=MEMORY_FORMATS[memory_format])
