"""Copies and checks the weights of an engine, which are independent of the model's.

Native steps and folded convolutions read copies in layouts of their own. Tensors that torch's
operations read at every call are copied here, and so is the rest of the graph's state if the engine
is to be saved or refreshed.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import (
    Affine,
    Conv,
    Graph,
    GroupNorm,
    LayerNorm,
    Node,
    Norm,
)
from resfuse.kernels.engine.ir.graph_state import node_state, read_at_calls, state_names
from resfuse.kernels.engine.runtime.symbolic import is_wrapper


def copies(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Returns the state with the tensors under `names` copied; names of one tensor share its
    copy."""
    copied: dict[Hashable, Tensor] = {}
    return {
        name: copied.setdefault(_identity(t), t.detach().clone()) if name in names else t
        for name, t in state.items()
    }


def _identity(t: Tensor) -> Hashable:
    memory = t.untyped_storage().data_ptr(), t.storage_offset()
    return *memory, t.dtype, t.device, tuple(t.shape), t.stride()


def copied_names(graph: Graph, keep_weights: bool) -> set[str]:
    """Returns the names of the tensors that an engine copies: those read at each call or, with
    `keep_weights`, all of the state."""
    return state_names(graph) if keep_weights else read_at_calls(graph)


def refreshed(
    state: Mapping[str, Tensor], constants: Collection[str], given: object
) -> dict[str, Tensor]:
    """Returns a copy of `given` with the names, dtypes and device of `state`; constants that are
    not in it keep their values.

    Raises:
        ValueError: `given` is no state_dict of dense tensors, or a tensor is missing or has another
            shape.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"argument state_dict: {type(given).__name__}; accepted: what model.state_dict() gives"
        )
    fresh = dict(state)
    for name, old in state.items():
        new = given.get(name)
        if new is None and name in constants:
            continue
        if new is None:
            raise ValueError(f"argument state_dict: {name} is missing{_beneath(given)}")
        _require_dense(name, new)
        if new.shape != old.shape:
            raise ValueError(
                f"argument state_dict: {name} has shape {tuple(new.shape)}; "
                f"this engine takes {tuple(old.shape)}"
            )
        if new.is_complex() and not old.is_complex():
            raise ValueError(f"argument state_dict: {name} is {new.dtype}; accepted: {old.dtype}")
        fresh[name] = new.detach().to(old.device, old.dtype, copy=True)
    return fresh


def _beneath(given: Mapping[object, object]) -> str:
    """Returns a hint if the state_dict seems to be one of a checkpoint's entries."""
    found = [key for key, value in given.items() if isinstance(value, Mapping)]
    return f"; {found[0]!r} may hold the state_dict" if found else ""


def _require_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        said = type(tensor).__name__
    elif tensor.layout != torch.strided:
        said = str(tensor.layout)
    elif tensor.is_meta:
        said = "a tensor on meta, which has no numbers"
    elif tensor.is_quantized:
        said = f"a quantized tensor, {tensor.dtype}"
    elif is_wrapper(tensor):
        said = f"a {type(tensor).__name__}"
    else:
        return
    raise ValueError(f"argument state_dict: {name} is {said}; accepted: dense tensors")


def require_usable(
    graphs: Iterable[Graph], state: Mapping[str, Tensor], constants: Collection[str], argument: str
) -> None:
    """Raises ValueError for weights that cannot be folded or are not finite, or of which nothing
    can be derived.

    Weights of convolutions and norms must be finite: each form of a convolution adds and multiplies
    in an order of its own, where infinity may become NaN. Tensors that only torch reads may be
    infinite (an attention mask), and NaN if they are not in the state_dict or derived from it.
    """
    graphs = list(graphs)
    for graph in graphs:
        try:
            state = {**state, **with_derived(graph, state)}
        except RuntimeError as error:  # a matrix that cannot be inverted, say
            said = str(error).strip().splitlines()[0]
            raise ValueError(
                f"argument {argument}: what the forward makes of its weights cannot be computed of "
                f"these: {said}"
            ) from error
    nodes = [node for graph in graphs for node in graph.nodes]
    folded = {name for node in nodes for name in _folded(node)}
    derived = {node.name for graph in graphs for node in graph.derived}
    for name in sorted({name for node in nodes for name in node_state(node)}):
        tensor = state[name]
        broken = tensor.is_floating_point() and (
            (name in folded and not tensor.isfinite().all())
            or (name not in constants and name not in derived and tensor.isnan().any())
        )
        if broken:
            what = f"what is computed of {name.partition(':')[0]}" if name in derived else name
            raise ValueError(f"argument {argument}: {what} holds values that are not finite")
    for norm in dict.fromkeys(filter(None, map(_norm_of, nodes))):
        if norm.var is not None and not (state[norm.var].float() + norm.eps > 0).all():
            raise ValueError(
                f"argument {argument}: {norm.var} holds variances that {norm.eps:g} does not make "
                "positive"
            )


def _norm_of(node: Node) -> Norm | None:
    return node.op.norm if isinstance(node.op, Conv | Affine) else None


def _folded(node: Node) -> set[str]:
    """Returns the names of the tensors that are folded into a convolution or norm, or are a
    slope."""
    own = isinstance(node.op, Conv | Affine | LayerNorm | GroupNorm)
    return node_state(node) if own else set()
