"""Torch's functions in place of the operations that a graph names: the same operations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resfuse.kernels.engine.ir.torch_operations import (
    _FUNCTIONS,
    function_named,
    operation_named,
)

X, ROWS = torch.randn(2, 3, 8), torch.randn(5, 8)
GIVEN: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "aten.add.Tensor": ((X, X), {"alpha": 2}),
    "aten.cat.default": (([X, X], 1), {}),
    "aten.gelu.default": ((X,), {"approximate": "tanh"}),
    "aten.hardswish.default": ((X,), {}),
    "aten.layer_norm.default": ((X, [8], X[0, 0], X[0, 1], 1e-3, False), {}),
    "aten.linear.default": ((X, ROWS, X[0, 0, :5]), {}),
    "aten.matmul.default": ((X, ROWS.t()), {}),
    "aten.mul.Tensor": ((X, 3.0), {}),
    "aten.permute.default": ((X, [2, 0, -2]), {}),
    "aten.reshape.default": ((X, [6, -1]), {}),
    "aten.select.int": ((X, -1, 2), {}),
    "aten.softmax.int": ((X, -1, torch.float64), {}),
    "aten.split_with_sizes.default": ((X, [2, 6], -1), {}),
    "aten.transpose.int": ((X, -1, 0), {}),
    "aten.unsqueeze.default": ((X, -2), {}),
}


class Calls(TorchDispatchMode):
    """Keeps the names of the operations that run, with what is no tensor of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg for arg in args if not isinstance(arg, Tensor)]
        self.made.append((str(func), repr(plain) if "cat" not in str(func) else ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_a_function_runs_what_the_operation_runs(name: str) -> None:
    args, kwargs = GIVEN[name]
    results, calls = [], []
    for function in (operation_named(name), function_named(name)):
        with Calls() as made:
            results.append(function(*args, **kwargs))
        calls.append(made.made)
    assert calls[0] == calls[1] and calls[0]
    one, other = (list(r) if isinstance(r, list | tuple) else [r] for r in results)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def test_the_others_are_the_operations_themselves() -> None:
    assert function_named("aten.tanh.default") is operation_named("aten.tanh.default")
    with pytest.raises(ValueError, match="there is no operation"):
        function_named("aten.nothing.default")
