"""Sets torch's default device while an engine is built."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_meta() -> Iterator[None]:
    """Makes the CPU the default device where that is meta: capturing a model and laying out weights
    need tensors with numbers."""
    if torch.get_default_device().type != "meta":
        yield
        return
    with torch.device("cpu"):
        yield
