"""Our own engine: the whole network planned for its shapes and this device."""

from collections.abc import Callable

from torch import Tensor, nn

from resfuse.bench.backends.streams import CallerStreams, Streams
from resfuse.bench.common.errors import CannotTake
from resfuse.kernels import build_engine


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The engine; it has the weights laid out its own way, and the model's are let go of.

    Raises:
        CannotTake: the network is one that engines are not built of.
    """
    try:
        return build_engine(model, example, keep_weights=False)
    except ValueError as refusal:
        raise CannotTake(f"the engine: {refusal}") from None


def streams(model: nn.Module, example: Tensor, cores: int) -> Streams:
    """An engine planned for one thread, and clones of it that share its weights.

    Raises:
        CannotTake: the network is one that engines are not built of.
    """
    try:
        first = build_engine(model, example, threads=1)
    except ValueError as refusal:
        raise CannotTake(f"the engine: {refusal}") from None
    return CallerStreams([first, *(first.clone() for _ in range(cores - 1))])
