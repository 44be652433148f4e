"""Makes the network of a case: the same weights and statistics in every process."""

import torch
from torch import nn

from resfuse.bench.backends.compute import Compute
from resfuse.bench.measuring import photographs as inputs
from resfuse.bench.models import onnx_file, random_weights
from resfuse.bench.models.model_builder import OWN, SEEDED, build
from resfuse.bench.models.sources import is_ours
from resfuse.bench.records.case import PRECISIONS, Case
from resfuse.kernels.ops.memory_format import to_memory_format
from resfuse.resnet_ref import calibrate, shrink_branches

CALIBRATION_IMAGES = 16
CALIBRATION_SEED = 1000  # none of the measured batches
# What quantized networks take their ranges from, in every backend alike: NNCF and others ask for
# 300 of a data set, these are crops of some ten photographs. Others than batch norms see.
QUANTIZATION_IMAGES = 64
QUANTIZATION_SEED = 2000
# Of each measured batch, for other people's networks: see random_weights.calibrate.
SEEN_IMAGES = 8
RANK_SEEDS = 10_000  # from one process's batches to the next one's
TIMED_BATCHES = 2  # the clock sees these; one more batch is kept back until it has stopped
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def master(case: Case, seed: int) -> nn.Module:
    """The network in eval mode, in the case's precision, on its device, contiguous."""
    return prepared(build(case.model, seed, case.weights), case, seed)


def prepared(model: nn.Module, case: Case, seed: int) -> nn.Module:
    """A network that `build` has made, behaving like a trained one, as `master` returns it.

    Seeded weights of our own networks get residual branches that add little (`shrink_branches`) and
    batch-norm statistics from photographs (`calibrate`), those of others as random_weights says:
    branches that add little only where an fp32 network is computed in bfloat16 or int8. As they
    are drawn, a deep network's rounding errors grow until any tolerance would let another image's
    answer pass. A function's own weights are taken for random where no batch norm has seen
    an image yet; those of an ONNX file stay, as other runtimes read them from there.
    """
    fresh = case.weights == OWN and random_weights.is_fresh(model)
    seeded = case.weights == SEEDED or (fresh and not onnx_file.is_from_file(model))
    if seeded and is_ours(case.model):
        shrink_branches(model)
        calibrate(model, _photographs(case, CALIBRATION_IMAGES, CALIBRATION_SEED))
    elif seeded:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random_weights.spread(model)
        if compute_dtype(case) is not None:
            random_weights.shrink_branches(model)
        random_weights.calibrate(model, seen(case))
    return model.eval().to(case.device, dtype(case))


def seen(case: Case, least: int = 0) -> torch.Tensor:
    """Returns the photographs [N, C, H, W] that the batch norms of other people's networks have
    seen, and more of their kind where at least as many are wanted."""
    seeds = [*range(TIMED_BATCHES + 1), CALIBRATION_SEED]
    each = max(SEEN_IMAGES, -(-least // len(seeds)))
    return torch.cat([_photographs(case, each, seed) for seed in seeds])


def dtype(case: Case) -> torch.dtype:
    found = getattr(torch, PRECISIONS[case.precision].dtype)
    assert isinstance(found, torch.dtype)
    return found


def compute_dtype(case: Case) -> torch.dtype | None:
    """Returns the dtype that backends compute in; None where it is that of the network."""
    name = PRECISIONS[case.precision].compute
    found = None if name is None else getattr(torch, name)
    assert found is None or isinstance(found, torch.dtype)
    return found


def compute(case: Case) -> Compute | None:
    """Returns what backends are told to compute in, with the photographs that a quantized network
    is calibrated on; None where that is the dtype of the network."""
    found = compute_dtype(case)
    if found is None:
        return None
    if not PRECISIONS[case.precision].is_quantized:
        return Compute(found)
    return Compute(found, _photographs(case, QUANTIZATION_IMAGES, QUANTIZATION_SEED))


def rehearsal(case: Case) -> Compute | None:
    """Returns the same for a small network of 8x8 images, whose calibration is noise."""
    found = compute_dtype(case)
    if found is None or not PRECISIONS[case.precision].is_quantized:
        return None if found is None else Compute(found)
    return Compute(found, torch.randn(QUANTIZATION_IMAGES, 3, 8, 8))


def element_bytes(case: Case) -> int:
    """Returns the bytes of a number that a backend has to move at the least."""
    found: int = getattr(torch, PRECISIONS[case.precision].storage).itemsize
    return found


def batches(case: Case, rank: int = 0) -> list[torch.Tensor]:
    """A case's batches [N, C, H, W], on its device: the timed ones, and one for afterwards.

    Args:
        rank: of the process; each has images of its own.
    """
    made = (
        _photographs(case, case.batch_size, RANK_SEEDS * rank + seed)
        for seed in range(TIMED_BATCHES + 1)
    )
    return [images.to(case.device, dtype(case)) for images in made]


def in_format(model: nn.Module, memory_format: str) -> nn.Module:
    return to_memory_format(model, MEMORY_FORMATS[memory_format])


def _photographs(case: Case, count: int, seed: int) -> torch.Tensor:
    channels, height, width = case.input_shape
    size = height if height == width else (height, width)
    return inputs.batch(case.images, count, size, seed, channels)
