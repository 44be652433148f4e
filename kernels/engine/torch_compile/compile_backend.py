"""compile_backend: the engine as a backend of torch.compile, known to torch as "resfuse".

Each graph that dynamo traces gets an engine of its own, for the sizes of the call that is compiled;
a graph with other sizes is traced again, as with `dynamic=False`. What an engine cannot run goes to
inductor, torch.compile's own backend, with a warning.
"""

import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from resfuse.kernels.cpu.weight_origin import Origin, why_not_followed
from resfuse.kernels.engine.build import build_engine
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.ir.graph import Torch
from resfuse.kernels.engine.ir.torch_operations import draws
from resfuse.kernels.engine.runtime.symbolic import is_wrapper
from resfuse.kernels.engine.torch_compile.compiled_graph import CompiledGraph
from resfuse.kernels.engine.torch_compile.dynamo_graph import (
    Arguments,
    Unsuitable,
    arguments_of,
    dim_of,
    module_of,
    require_own_memory,
)

# build_engine's keywords that are no options here: shapes come with the calls, and weights that
# change need the engine's own copy.
_NO_OPTIONS = {"model", "example", "shapes", "keep_weights"}
# Starts of its refusals that say something of the model, and not of an option.
_OF_THE_MODEL = (
    "argument model: ", "argument example: ", "argument cuda_graph: ",
    "argument other_batches: 'pad' is not possible",
)  # fmt: skip
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def compile_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles a graph of dynamo's: `torch.compile(model, backend="resfuse", options={...})`.

    Where dynamo leaves the batch free (the second batch size it meets, `dynamic=True` or
    `mark_dynamic`), one engine serves all of them with `other_batches` "pad" or "eager", and one
    all shapes with `other_shapes="build"`. Otherwise each shape has a graph and an engine.

    Args:
        options: keyword arguments of `build_engine`, but for `shapes` and `keep_weights`.
        mode: none; inductor has some.

    Raises:
        ValueError: an option is unknown or has a value that `build_engine` refuses.
    """
    given = _checked(options or {}, mode)
    try:
        return _compiled(gm, example_inputs, given)
    except Unsuitable as reason:
        from torch._dynamo.backends.registry import lookup_backend

        warnings.warn(
            f"resfuse: inductor compiles a graph that no engine can run: {reason}", stacklevel=2
        )
        return lookup_backend("inductor")(gm, list(example_inputs))


def option_names() -> list[str]:
    """Returns the names of the options that `compile_backend` takes."""
    return [name for name in inspect.signature(build_engine).parameters if name not in _NO_OPTIONS]


def _checked(options: Mapping[str, Any], mode: str | None) -> dict[str, Any]:
    if mode is not None:
        raise ValueError(f"argument mode: {mode!r}; an engine has options, and no modes")
    accepted = option_names()
    for name in options:
        if name not in accepted:
            near = difflib.get_close_matches(str(name), accepted, n=2)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"argument options: {name!r} is not known{meant}; accepted: {', '.join(accepted)}"
            )
    return dict(options)


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]
) -> CompiledGraph:
    """
    Raises:
        Unsuitable: no engine can run the graph.
    """
    arguments = arguments_of(gm, example_inputs)
    _require_inference(arguments, example_inputs)
    require_own_memory(gm)
    free = _free_dims(arguments, options)
    named = {name: example_inputs[at] for name, at in arguments.weights.items()}
    if (reason := why_not_followed([(named, name) for name in named])) is not None:
        raise Unsuitable(reason)
    with _disable_current_modes(), torch._guards.tracing(None), torch.inference_mode(False):
        origin = Origin(list(named.values()))  # before they are read: a write in between is seen
        module = module_of(gm, arguments, example_inputs, free)
        x = example_inputs[arguments.x].detach().clone()
        try:
            engine = build_engine(module, x, **_options_for(x, free, options))
        except ValueError as error:
            if str(error).startswith(_OF_THE_MODEL):
                raise Unsuitable(_reason(str(error))) from error
            raise
    _require_no_draws(engine)
    _specialise(arguments, free, engine)
    return CompiledGraph(gm, arguments, engine, origin)


def _reason(said: str) -> str:
    """Returns what build_engine has said of a graph's module as a reason."""
    if written := re.search(r"GraphModule writes to (\w+)", said):
        return (
            f"it writes to {written[1]}, as batch norms do in training mode; call model.eval() if "
            "that was not meant"
        )
    return said.removeprefix("argument model: ").replace("GraphModule ", "it ")


def _require_inference(arguments: Arguments, example_inputs: Sequence[Any]) -> None:
    x = example_inputs[arguments.x]
    tensors = [each for each in example_inputs if isinstance(each, Tensor)]
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        raise Unsuitable(
            "gradients are recorded; call it under torch.inference_mode() or torch.no_grad()"
        )
    if torch.is_autocast_enabled(x.device.type):
        raise Unsuitable("it runs under autocast; an engine computes in the dtype of its weights")
    if is_wrapper(x):
        raise Unsuitable(f"its input is a {type(x).__name__}, which has no numbers of its own")
    if x.dtype not in _DTYPES:
        raise Unsuitable(f"its input is {x.dtype}; an engine takes float32, float16 and bfloat16")
    if x.device.type not in ("cpu", "cuda"):
        raise Unsuitable(f"its input is on {x.device}; an engine runs on a CPU or a CUDA GPU")


def _free_dims(arguments: Arguments, options: Mapping[str, Any]) -> set[int]:
    """Returns the dimensions of the input that dynamo has left free and the engine may, too."""
    free = {dim for dim, size in enumerate(arguments.shape) if isinstance(size, torch.SymInt)}
    if options.get("other_shapes", "error") == "build":
        return free
    return free & {0} if options.get("other_batches", "error") != "error" else set()


def _options_for(x: Tensor, free: set[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of build_engine for an input: those for other sizes only where it may
    come in others."""
    found, sizes = dict(options), options.get("batch_sizes")
    if isinstance(sizes, Sequence) and (0 not in free or x.shape[0] > max(sizes, default=0)):
        del found["batch_sizes"]
    if not free and found.get("other_shapes") == "build":
        del found["other_shapes"]
    if 0 not in free and found.get("other_batches") in ("pad", "eager"):
        del found["other_batches"]
    return found


def _require_no_draws(engine: Engine) -> None:
    for node in (node for graph in engine.graphs for node in graph.nodes):
        if isinstance(node.op, Torch) and draws(node.op):
            raise Unsuitable(f"it draws random numbers ({node.op.target})")


def _specialise(arguments: Arguments, free: set[int], engine: Engine) -> None:
    """Has dynamo guard the sizes and numbers that the engine is for: for others it traces anew."""
    for dim, size in enumerate(arguments.shape):
        if dim not in free:
            int(size)
    for number in arguments.numbers.values():
        float(number)
    for at, size in arguments.sizes.items():
        if dim_of(arguments, at) not in free:
            int(size)
    if 0 in free and engine.other_batches == "pad" and engine.other_shapes == "error":
        bool(arguments.shape[0] <= max(engine.batch_sizes))
