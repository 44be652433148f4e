"""Notices when a forward asks for a tensor's memory layout: `y.is_contiguous()`, `x.stride()`. The
captured graph has the answers for the example built in, so such an engine accepts only inputs of
the example's layout.
"""

import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_QUESTIONS = frozenset({
    "stride", "is_contiguous", "dim_order", "storage_offset", "is_non_overlapping_and_dense",
})  # fmt: skip
_BY_ADDRESS = frozenset(  # these read raw memory, which differs in the engine's arena
    {"as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "set_",
     "untyped_storage", "storage", "_typed_storage", "data_ptr", "resize_", "resize_as_"}
)  # fmt: skip
_BETWEEN = ("torch.overrides", "torch._tensor", "torch._jit_internal")


class LayoutQuestions(TorchFunctionMode):
    """A context that records the questions that a model's code asks; those of torch's own code do
    not count."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.offset = False
        self.by_address: str | None = None  # the call that reads memory by address

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if (name in _QUESTIONS or name in _BY_ADDRESS) and _by_user(sys._getframe(1)):
            self.asked = self.asked or name in _QUESTIONS
            self.by_address = self.by_address or (name if name in _BY_ADDRESS else None)
            self.offset = self.offset or name == "storage_offset"
        profiler = sys.getprofile()
        sys.setprofile(None)  # the profiler observes the forward only, not torch's own code
        try:
            return func(*args, **(kwargs or {}))
        finally:
            sys.setprofile(profiler)

    def layout_of(self, example: Tensor) -> tuple[int, ...] | None:
        """Returns the strides that inputs must share with the example, followed by the storage
        offset if the forward asks for it; None if it asks for neither."""
        offset = (example.storage_offset(),) if self.offset else ()
        return (*example.stride(), *offset) if self.asked else None


def _by_user(frame: types.FrameType | None) -> bool:
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if frame.f_code.co_name != "__torch_function__" and name not in _BETWEEN:
            return name.partition(".")[0] not in ("torch", "contextlib")
        frame = frame.f_back
    return False


def require_layout(x: Tensor, wanted: tuple[int, ...] | None) -> None:
    """Raises ValueError unless `x` lies in memory as a graph's layout says."""
    if wanted is None:
        return
    found = (*x.stride(), x.storage_offset())
    if found[: len(wanted)] != wanted:
        layouts = [f"strides {lies[: x.dim()]}" + f" at offset {lies[-1]}" * (len(wanted) > x.dim())
                for lies in (found, wanted)]  # fmt: skip
        raise ValueError(
            f"argument x: {layouts[0]}; the model asks how its tensors lie in memory, and this "
            f"engine was built for {layouts[1]}"
        )
