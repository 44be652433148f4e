"""Whether a forward asks how a tensor lies in memory: `y.is_contiguous()`, `x.stride()`. What was
captured has the example's answers built in: the engine takes inputs only that lie as that did.
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
_BY_ADDRESS = frozenset(  # what is there is another matter in memory of the engine's own
    {"as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "set_",
     "untyped_storage", "storage", "_typed_storage", "data_ptr", "resize_", "resize_as_"}
)  # fmt: skip
_BETWEEN = ("torch.overrides", "torch._tensor", "torch._jit_internal")


class LayoutQuestions(TorchFunctionMode):
    """Notes what a model's code asks while this is entered; torch's own code may ask anything."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.offset = False
        self.by_address: str | None = None  # what reads memory past torch's idea of a tensor

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
        sys.setprofile(None)  # the forward is watched, and not what torch does for it
        try:
            return func(*args, **(kwargs or {}))
        finally:
            sys.setprofile(profiler)

    def layout_of(self, example: Tensor) -> tuple[int, ...] | None:
        """What inputs must have in common with the example: strides, and where it was asked for,
        the storage offset; None where nothing was."""
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
        told = [f"strides {lies[: x.dim()]}" + f" at offset {lies[-1]}" * (len(wanted) > x.dim())
                for lies in (found, wanted)]  # fmt: skip
        raise ValueError(
            f"argument x: {told[0]}; the model asks how its tensors lie in memory, and this engine "
            f"was built for {told[1]}"
        )
