"""torch's default device while an engine is made."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_meta() -> Iterator[None]:
    """Puts tensors on the CPU where the default device has no numbers: torch's own capture, and
    weights laid out, need tensors that do."""
    if torch.get_default_device().type != "meta":
        yield
        return
    with torch.device("cpu"):
        yield
