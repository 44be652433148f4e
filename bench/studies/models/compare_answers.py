"""One network of other people's: its own answers, and those of `fuse` and the engine."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resfuse.bench.measuring import photographs
from resfuse.bench.records.sample import Value
from resfuse.bench.studies.models import networks
from resfuse.kernels import build_engine, explain, fuse
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES

Run = Callable[[Tensor], object]
IMAGES, CALIBRATION_IMAGES = 2, 8
WORST_EAGER = 1e-3  # twice more would hide a fold that is wrong
# A channel that is zero in nearly all calibration images would be multiplied by up to
# 1 / sqrt(eps) = 316 where it is not: RepVGG-B0 amplified rounding 276 times, RepVGG-D2se to 0.7.
LEAST_VARIANCE = 0.1  # of the norm's mean


def compare(
    network: str, wanted_size: int, kinds: Sequence[str] = ("fuse", "engine")
) -> dict[str, Value]:
    """Returns a row of the study, which compares both answers to two batches with eager's and
    fp64's.

    `fuse` also answers a batch of another size, which it must, and gives memory formats as eager
    does. A refusal is a ValueError whose message goes into the row; any other exception is an error
    of ours.
    """
    torch.manual_seed(0)
    model = networks.create(network)
    spread(model)
    size = networks.image_size(network, model, wanted_size)
    batches = [
        photographs.batch(photographs.BUNDLED, count, size, seed=count) for count in (IMAGES, 3)
    ]
    others = photographs.batch(photographs.BUNDLED, CALIBRATION_IMAGES, size, seed=7)
    calibrate(model, torch.cat([*batches, others]))
    with torch.no_grad():
        nhwc = deepcopy(model).to(memory_format=torch.channels_last)
        eager = [y for x in batches for y in leaves(model, x)]
        in_nhwc = [
            y for x in batches for y in leaves(nhwc, x.to(memory_format=torch.channels_last))
        ]
        twin = nhwc.double()
        exact = [y for x in batches for y in leaves(twin, x.double())]
    own = max(map(error, [*eager, *in_nhwc], [*exact, *exact]))
    if own > WORST_EAGER:
        raise ArithmeticError(f"off by {own:.1e} from fp64, as it amplifies rounding: no yardstick")
    allowed = EAGER_FACTOR * own + TOLERANCES["ieee"].rtol
    row: dict[str, Value] = {
        "network": network, "img_size": size, "eager_rel_l2": own,
        "param_count": sum(p.numel() for p in model.parameters()),
        "convolutions": sum(isinstance(m, nn.Conv2d) for m in model.modules()),
    }  # fmt: skip

    def by_fuse() -> float:
        fused = fuse(model)
        explanation = explain(fused, batches[0])
        row["macs_fused_pct"] = None if explanation.share is None else 100 * explanation.share
        with torch.no_grad():
            got = [y for x in batches for y in leaves(fused, x)]
        for answer, wanted in zip(got, eager, strict=True):
            if answer.stride() != wanted.stride():
                raise WrongAnswerError(f"strides {answer.stride()} for eager's {wanted.stride()}")
        return max(map(error, got, exact))

    def by_engine() -> float:
        engine = build_engine(model, batches[0])
        return max(map(error, leaves(engine, batches[0]), exact))

    for kind, answer in (("fuse", by_fuse), ("engine", by_engine)):
        if kind in kinds:
            row |= judged(kind, answer, allowed)
    return row


class WrongAnswerError(Exception):
    """What came out differs from eager in more than its numbers."""


def judged(what: str, answer: Callable[[], float], allowed: float) -> dict[str, Value]:
    """Returns the status (pass, wrong, refused or error), the error against fp64, and the
    message."""
    try:
        found = answer()
    except ValueError as refusal:
        return {f"{what}_status": "refused", f"{what}_error": _one_line(refusal)}
    except WrongAnswerError as difference:
        return {f"{what}_status": "wrong", f"{what}_error": _one_line(difference)}
    except Exception as failure:
        said = f"{type(failure).__name__}: {_one_line(failure)}"
        return {f"{what}_status": "error", f"{what}_error": said}
    status = "pass" if found <= allowed else "wrong"  # NaN is wrong, too
    return {f"{what}_status": status, f"{what}_rel_l2": found, f"{what}_error": ""}


def spread(model: nn.Module) -> None:
    """Draws anew what starts constant: a last norm's scale of 0 or a layer scale of 1e-6 would
    hide whatever its branch computes, and a scale of 1 whatever is folded wrongly.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                tiny = abs(float(parameter.flatten()[0])) < 0.1
                if tiny:
                    parameter.normal_(std=0.2 if parameter.dim() < 2 else 0.02)
                else:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Statistics of these images for every batch norm, so that roundings do not grow from layer to
    layer as they do in a network whose activations explode; the model is in eval mode afterwards.

    The images that are compared must be among them. Statistics of a few images, at two pixels a
    side, fit no others: without, activations of torchvision's EfficientNetV2-S grew 400 times, and
    eager's own error was 2e-3 instead of 9e-6.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the mean over what it sees
    with torch.no_grad():
        model(images)
        for norm in norms:
            if norm.running_var is not None:
                norm.running_var.clamp_(min=LEAST_VARIANCE * float(norm.running_var.mean()))
    model.eval()


def leaves(run: Run, x: Tensor) -> list[Tensor]:
    """Returns the tensors in an answer."""
    return [leaf.clone() for leaf in tree_leaves(run(x.clone())) if isinstance(leaf, Tensor)]


def error(got: Tensor, exact: Tensor) -> float:
    """Returns the relative L2 error, infinite where the shapes differ."""
    if got.shape != exact.shape:
        return float("inf")
    distance = float((got.double() - exact.double()).norm())
    return distance / max(float(exact.double().norm()), 1e-30)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
