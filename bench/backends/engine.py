"""Our own engine: the whole network planned for its shapes and this device."""

from collections.abc import Callable

from torch import Tensor, nn

from resfuse.kernels import build_engine


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The engine; it has the weights laid out its own way, and the model's are let go of.

    It takes images of either memory format, whichever the example has; build_engine's example must
    be contiguous.
    """
    return build_engine(model, example.contiguous(), keep_weights=False)
