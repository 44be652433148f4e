"""An fp32 network computed in another dtype by converting it: its weights once, images and answers
in every call.

So users run bfloat16 in torch where they look for speed. Under `torch.autocast` weights are
converted in every call: ResNet-50 then takes 4 to 5 % longer on a CPU (docs/design/harness.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from resfuse.bench.backends.streams import Answer, Query, Streams, Take

Run = Callable[[Tensor], Any]
Build = Callable[[nn.Module, Tensor], Run]


class Converted(nn.Module):
    """A network that takes and returns what the fp32 one does, and computes in `dtype`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Converts `model` itself, so that there are no two copies of its weights."""
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Any:
        return restored(self.model(images.to(self.dtype)), self.dtype, images.dtype)


def in_dtype(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Returns the network that computes in `dtype`; the model itself for None."""
    return model if dtype is None else Converted(model, dtype)


def restored(output: Any, dtype: torch.dtype, wanted: torch.dtype) -> Any:
    """The output of a network, its tensors of `dtype` converted to the wanted one."""

    def back(y: Tensor) -> Tensor:
        return y.to(wanted) if y.dtype == dtype else y

    return back(output) if isinstance(output, Tensor) else tree_map_only(Tensor, back, output)


def converted(build: Build, dtype: torch.dtype) -> Build:
    """Returns a `build` that gives another one the network in `dtype`."""

    def build_converted(model: nn.Module, example: Tensor) -> Run:
        return _ConvertedRun(build(model.to(dtype), example.to(dtype)), dtype)

    return build_converted


class _ConvertedRun:
    """What a backend built in `dtype`, between two conversions."""

    def __init__(self, run: Run, dtype: torch.dtype) -> None:
        self._run, self._dtype = run, dtype

    def __call__(self, images: Tensor) -> Any:
        return restored(self._run(images.to(self._dtype)), self._dtype, images.dtype)

    def explain(self, batch_size: int) -> str:
        """What a backend says of its own plan, "" where it says nothing."""
        told = getattr(self._run, "explain", None)
        return str(told(batch_size)) if callable(told) else ""


class ConvertedStreams:
    """Streams in `dtype`; whoever takes or answers a query converts it."""

    def __init__(self, streams: Streams, dtype: torch.dtype) -> None:
        self._streams, self._dtype = streams, dtype
        self.count, self.takers = streams.count, streams.takers

    def serve(self, take: Take, answer: Answer) -> None:
        asked: dict[int, Query] = {}  # by number; each is one thread's until it is answered

        def take_converted(taker: int) -> Query | None:
            query = take(taker)
            if query is None:
                return None
            asked[query.number] = query
            return Query(query.number, query.images.to(self._dtype))

        def answer_converted(query: Query, output: Any) -> None:
            given = asked.pop(query.number)
            answer(given, restored(output, self._dtype, given.images.dtype))

        self._streams.serve(take_converted, answer_converted)
