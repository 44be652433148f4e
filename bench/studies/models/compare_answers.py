"""One network of other people's: its own answers, and those of `fuse` and the engine."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resfuse.bench.measuring import photographs
from resfuse.bench.models.random_weights import calibrate, spread
from resfuse.bench.records.sample import Value
from resfuse.bench.studies.models import networks
from resfuse.kernels import build_engine, explain, fuse
from resfuse.kernels.ops.memory_format import to_memory_format
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES

Run = Callable[[Tensor], object]
IMAGES, CALIBRATION_IMAGES = 2, 8
WORST_EAGER = 1e-3  # twice more would hide a fold that is wrong


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
        nhwc = to_memory_format(deepcopy(model), torch.channels_last)
        twin = deepcopy(nhwc).double()
        eager = [leaves(model, x) for x in batches]
        exact = [leaves(twin, x.double()) for x in batches]
        own = max(own_error(model, nhwc, twin, x) for x in [*batches, *others.split(IMAGES)])
    require_yardstick(own)
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
            got = [leaves(fused, x) for x in batches]
        for answer, wanted in zip(chain(*got), chain(*eager), strict=True):
            if answer.stride() != wanted.stride():
                raise WrongAnswerError(f"strides {answer.stride()} for eager's {wanted.stride()}")
        return max(map(worst_error, got, exact))

    def by_engine() -> float:
        engine = build_engine(model, batches[0])
        return worst_error(leaves(engine, batches[0]), exact[0])

    for kind, answer in (("fuse", by_fuse), ("engine", by_engine)):
        if kind in kinds:
            row |= judged(kind, answer, allowed)
    return row


def own_error(model: nn.Module, nhwc: nn.Module, twin: nn.Module, x: Tensor) -> float:
    """Returns how far a network by itself is off from fp64 at worst, in either memory format. A
    network that amplifies rounding does so on some images and not on others (EfficientNet-CC by
    1e-6 to 1e-2), so many are asked."""
    exact = leaves(twin, x.double())
    in_nhwc = leaves(nhwc, x.to(memory_format=torch.channels_last))
    return max(worst_error(leaves(model, x), exact), worst_error(in_nhwc, exact))


def require_yardstick(own: float) -> None:
    """Raises ArithmeticError where eager's own error says nothing of what is right."""
    if not own <= WORST_EAGER:
        raise ArithmeticError(f"off by {own:.1e} from fp64, as it amplifies rounding: no yardstick")


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


def leaves(run: Run, x: Tensor) -> list[Tensor]:
    """Returns the tensors in an answer."""
    return [leaf.clone() for leaf in tree_leaves(run(x.clone())) if isinstance(leaf, Tensor)]


def worst_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(map(error, got, exact))


def error(got: Tensor, exact: Tensor) -> float:
    """Returns the relative L2 error, infinite where the shapes differ."""
    if got.shape != exact.shape:
        return float("inf")
    distance = float((got.double() - exact.double()).norm())
    return distance / max(float(exact.double().norm()), 1e-30)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
