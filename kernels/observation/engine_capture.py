"""Tells fused modules that an engine captures the model: they run their own layers then, since the
engine reads the weights of those, and fuses by itself.
"""

import contextlib
import threading
from collections.abc import Iterator

OF_FUSED_MODULES = "_resfuse_"  # what the attributes begin with that `fuse` gives a module
_here = threading.local()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """A context in which this thread's fused modules run their own layers."""
    outer = is_capturing()
    _here.active = True
    try:
        yield
    finally:
        _here.active = outer


def is_capturing() -> bool:
    """Whether this thread is in such a context."""
    return getattr(_here, "active", False)
