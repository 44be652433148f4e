"""What folded weights were made from, and whether it is still what it was.

torch counts writes to a tensor, but not all: not those of optimizers with fused=True, through
`.data`, numpy or another process, nor any to an inference tensor. So three things are looked at:

- which tensors the layers hold, where those lie, in which strides, and their counts of writes;
- a digest of what lies there, on a CPU (cpu/weight_digest.py): of some of it at every call, of all
  of it when something has happened that may write;
- steps of optimizers, which tell which parameters they own (plan.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from resfuse.kernels.cpu.library import why_unavailable
from resfuse.kernels.cpu.weight_digest import Digest

Source = tuple[dict[str, Any], str]  # where a layer keeps a tensor: its dict and the name in it
Stamp = tuple[list[int], list[int], list[int], list[tuple[int, ...]]]
NO_STAMP: Stamp = ([], [], [], [])
_UNCOUNTED = -1  # the version of a tensor that has none


def sources_of(layer: nn.Module) -> list[Source]:
    """Where the tensors are that tell whether a layer has changed. torch's batch norm moves its
    running statistics without counting their versions, but counts the batch."""
    named: list[Source] = [(layer._parameters, name) for name in layer._parameters]
    telling = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return named + [(layer._buffers, name) for name in layer._buffers if name in telling]


def tensors_of(sources: list[Source]) -> list[Tensor]:
    return [tensor for holder, name in sources if (tensor := holder.get(name)) is not None]


def stamp_of(tensors: list[Tensor]) -> Stamp:
    """Changes when a tensor is replaced, moved, restrided, or written to by what counts."""
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # there are inference tensors among them
        versions = list(map(_version_of, tensors))
    return (
        list(map(id, tensors)),
        [tensor.data_ptr() for tensor in tensors],
        versions,
        [tensor.stride() for tensor in tensors],
    )


def _version_of(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # nor has one that was given other data, which is_inference() denies then
        return _UNCOUNTED


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is memory and nothing else: no subclass that does things of its own, nothing
    sparse, quantised, nested, wrapped by functorch, or to be negated or conjugated when read."""
    return (
        (type(tensor) is Tensor or type(tensor) is nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def why_not_followed(sources: list[Source]) -> str | None:
    """The reason not to fold layers whose tensors cannot be followed; None where there is none."""
    for holder, name in sources:
        if name not in holder:
            return f"{name} is no parameter or buffer any more"
        tensor = holder[name]
        if tensor is None:
            continue
        if not is_plain(tensor) or tensor.device.type not in ("cpu", "cuda"):
            return f"{name} is a {type(tensor).__name__} on {tensor.device}"
        if not _is_dense(tensor):
            return f"{name} has gaps or overlaps in memory"
        if tensor.is_cuda and _version_of(tensor) == _UNCOUNTED:
            return f"{name} is an inference tensor: nothing counts the writes to it"
    return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements are all the memory from the first to the last, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Origin:
    """Tensors as they are when this is made.

    The memory is held, too: as long as it is not given back, nothing new can lie at its address.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.stamp = stamp_of(tensors)
        self._tensors = tensors
        self._memory = [tensor.detach() for tensor in tensors]
        # Of what lies on a GPU nothing is read: the host would have to wait for it at every call.
        self.is_readable = all(tensor.is_cpu for tensor in tensors)
        here = [t for t in self._memory if t.is_cpu and t.numel() > 0 and is_plain(t)]
        here = [tensor for tensor in here if _is_dense(tensor)]
        uncounted = [tensor for tensor in here if _version_of(tensor) == _UNCOUNTED]
        self._digest: Digest | Copies | None = None
        if here:
            self._digest = (
                Digest(here, uncounted) if why_unavailable() is None else Copies(here, uncounted)
            )

    def is_where_it_was(self, tensors: list[Tensor]) -> bool:
        """Whether those are the same tensors, in the same memory, not written to by what counts."""
        try:
            return stamp_of(tensors) == self.stamp
        except (RuntimeError, TypeError):  # some are not memory any more: fake ones, sparse ones
            return False

    def seems_unchanged(self) -> bool:
        """What a call asks of memory that is where it was."""
        return self._digest is None or self._digest.seems_unchanged()

    def is_unchanged(self) -> bool:
        """Whether every byte is as it was, as far as that can be told from a CPU."""
        return self._digest is None or self._digest.is_unchanged()

    def is_fresh(self) -> bool:
        """Whether its own tensors are as they were."""
        return self.is_where_it_was(self._tensors) and self.is_unchanged()


class Copies:
    """What Digest does, where there is no native library: small tensors and a sample of the large
    ones are kept and compared at a call, sums of all elements otherwise. About 1 ms a call."""

    _SMALL, _SAMPLES = 1 << 12, 64  # elements

    def __init__(self, tensors: list[Tensor], in_full: list[Tensor]) -> None:
        always = {id(tensor) for tensor in in_full}
        self._all = [_words(tensor) for tensor in tensors]
        self._read = [
            words
            if len(words) <= self._SMALL or id(tensor) in always
            else words[:: len(words) // self._SAMPLES | 1]
            for tensor, words in zip(tensors, self._all, strict=True)
        ]
        self._kept = [words.clone() for words in self._read]
        self._sums = self._summed()

    def seems_unchanged(self) -> bool:
        with _disable_current_modes():
            return all(map(torch.equal, self._read, self._kept))

    def is_unchanged(self) -> bool:
        return self.seems_unchanged() and self._summed() == self._sums

    def _summed(self) -> list[tuple[int, int]]:
        """Of each tensor's words, plain and by place, modulo 2**64."""
        with _disable_current_modes():
            return [
                (int(w.sum()), int((w * torch.arange(1, 2 * len(w), 2, device="cpu")).sum()))
                for w in (words.long() for words in self._all)
            ]


def _words(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as integers, of the same size each."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,))
    return flat.view(kinds[tensor.element_size()])
