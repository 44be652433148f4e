"""torch_call: an operation that torch runs, as a function of the values that it reads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import State, Torch
from resfuse.kernels.engine.ir.torch_operations import function_named


def torch_call(op: Torch, state: State) -> Callable[..., Tensor]:
    """Returns an operation as a function of its node's inputs.

    Args:
        state: has the tensors of the state that it reads.
    """
    target = function_named(op.target)

    # What no input is in is decoded once: each call's Python was a fifth of LeViT-128S's time.
    given = [None if _reads_value(arg) else _decode(arg, (), state) for arg in op.args]
    named = {key: _decode(arg, (), state) for key, arg in op.kwargs if not _reads_value(arg)}
    varied = [(at, arg) for at, arg in enumerate(op.args) if _reads_value(arg)]
    varied_named = [(key, arg) for key, arg in op.kwargs if _reads_value(arg)]

    def run(*inputs: Tensor) -> Tensor:
        args, kwargs = given.copy(), named
        for at, arg in varied:
            args[at] = _decode(arg, inputs, state)
        if varied_named:
            kwargs = named | {key: _decode(arg, inputs, state) for key, arg in varied_named}
        result = target(*args, **kwargs)
        part: Tensor = result if op.result is None else result[op.result]
        return part

    return run


def _reads_value(arg: Any) -> bool:
    """Returns whether an encoded argument has one of the node's inputs in it."""
    if isinstance(arg, list | tuple):
        return any(map(_reads_value, arg))
    return isinstance(arg, dict) and "value" in arg


def _decode(arg: Any, inputs: tuple[Tensor, ...], state: State) -> Any:
    if isinstance(arg, dict) and "value" in arg:
        return inputs[arg["value"]]
    if isinstance(arg, list | tuple):
        return [_decode(item, inputs, state) for item in arg]
    if not isinstance(arg, dict):
        return arg
    ((kind, what),) = arg.items()
    if kind == "state":
        return state[what]
    return torch.device(what) if kind == "device" else getattr(torch, what)
