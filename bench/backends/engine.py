"""Our own engine: the whole network planned for its shapes and this device."""

from collections.abc import Callable

from torch import Tensor, nn

from resfuse.kernels import build_engine


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The engine; it has the weights laid out its own way, and the model's are let go of."""
    return build_engine(model, example, keep_weights=False)
