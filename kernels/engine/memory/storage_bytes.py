"""Counts the bytes behind tensors: each storage once, however many tensors share it, and oneDNN's
packed ones.
"""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor


def storages(tensors: Iterable[Tensor]) -> dict[Hashable, int]:
    """Returns the bytes of each storage behind the tensors, whole even where a tensor sees a part.

    A tensor laid out by oneDNN has no storage that torch knows of; it stands for itself.
    """
    return dict(map(_storage, tensors))


def _storage(tensor: Tensor) -> tuple[Hashable, int]:
    if tensor.is_mkldnn:
        return ("mkldnn", id(tensor)), int(torch.ops.mkldnn._nbytes(tensor))
    storage = tensor.untyped_storage()
    return (tensor.device, storage.data_ptr()), storage.nbytes()
