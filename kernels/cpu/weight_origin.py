"""Origin: checks whether the tensors that folded weights were computed from have changed.

torch counts writes to a tensor, but not those of optimizers with fused=True, through `.data`, numpy
or another process, nor any to an inference tensor. So three things are checked:

- the identity, address, strides and version of the layers' tensors;
- on a CPU, a digest of their bytes (weight_digest.py): of some at every call, of all after anything
  that may write to them;
- steps of optimizers, which know their parameters (observation/optimizer_steps.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from resfuse.kernels.cpu.library import why_unavailable
from resfuse.kernels.cpu.weight_digest import Digest

Source = tuple[dict[str, Any], str]  # a tensor of a layer: the layer's dict and the name in it
Stamp = tuple[list[int], list[int], list[int], list[tuple[int, ...]]]
NO_STAMP: Stamp = ([], [], [], [])
_UNCOUNTED = -1  # the version of a tensor that has none


def sources_of(layer: nn.Module) -> list[Source]:
    """Returns the sources of all tensors by which a change of a layer is recognised. torch's batch
    norm updates its running statistics without counting a version, but counts the batch."""
    named: list[Source] = [(layer._parameters, name) for name in layer._parameters]
    telling = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return named + [(layer._buffers, name) for name in layer._buffers if name in telling]


def tensors_of(sources: list[Source]) -> list[Tensor]:
    """Returns the tensors of the sources that have one."""
    return [tensor for holder, name in sources if (tensor := holder.get(name)) is not None]


def stamp_of(tensors: list[Tensor]) -> Stamp:
    """Returns a value that differs after a tensor is replaced, moved, restrided, or written to by
    an operation that counts a version."""
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
    except (
        RuntimeError
    ):  # an inference tensor, even where is_inference() denies it after its data was replaced
        return _UNCOUNTED


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is plain strided memory: no subclass, not sparse, quantised, nested
    or wrapped by functorch, and not lazily negated or conjugated."""
    return (
        (type(tensor) is Tensor or type(tensor) is nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def why_not_followed(sources: list[Source]) -> str | None:
    """Returns the reason why changes of the sources' tensors cannot be noticed, None without
    one."""
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
    """Returns whether the tensor's elements fill its memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Origin:
    """The state of some tensors at the time of its creation.

    It holds on to their memory, so that no other tensor can appear at the same address.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.stamp = stamp_of(tensors)
        self._tensors = tensors
        self._memory = [tensor.detach() for tensor in tensors]
        # Tensors on a GPU are not read, since the host would have to wait for it at every call.
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
        """Returns whether `tensors` have the original stamp: identities, addresses, versions,
        strides."""
        try:
            return stamp_of(tensors) == self.stamp
        except (RuntimeError, TypeError):  # some have no memory any more: fake or sparse tensors
            return False

    def seems_unchanged(self) -> bool:
        """Returns whether a sample of the memory is unchanged, as a call checks it; the tensors
        must not have moved."""
        return self._digest is None or self._digest.seems_unchanged()

    def is_unchanged(self) -> bool:
        """Returns whether every byte of the tensors on the CPU is unchanged."""
        return self._digest is None or self._digest.is_unchanged()

    def is_fresh(self) -> bool:
        """Returns whether the original tensors have not changed."""
        return self.is_where_it_was(self._tensors) and self.is_unchanged()


class Copies:
    """A Digest without the native library: copies of small tensors and of samples of large ones are
    compared at every call (about 1 ms), and sums of all elements for a full check."""

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
        """Returns two sums of each tensor's words modulo 2**64: plain, and weighted by position."""
        with _disable_current_modes():
            return [
                (int(w.sum()), int((w * torch.arange(1, 2 * len(w), 2, device="cpu")).sum()))
                for w in (words.long() for words in self._all)
            ]


def _words(tensor: Tensor) -> Tensor:
    """Returns the memory of a dense tensor as integers of its elements' size."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,))
    return flat.view(kinds[tensor.element_size()])
