"""Checks that a model computes the same for each image at any batch size: torch.export with a batch
of symbolic size succeeds, or names the line of the forward that depends on the size.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.engine.frontend.batching.image_dimension import Images
from resfuse.kernels.engine.frontend.batching.image_independence import images_at_all_sizes
from resfuse.kernels.engine.frontend.side_effects import SideEffects
from resfuse.kernels.engine.ir.graph import Conv, Graph, Operation, State, Torch
from resfuse.kernels.engine.ir.graph_state import state_read_by

aten = torch.ops.aten
# (model, input) -> its graph, and the weights by name
Capture = Callable[[nn.Module, Tensor], tuple[Graph, Mapping[str, Tensor]]]
_NOT_POSSIBLE = "argument other_batches: 'pad' is not possible: "
# Operations that may be given the size of the batch, which determines the size of the result only.
_SHAPED = {
    "reshape", "expand", "repeat", "unflatten", "zeros", "ones", "full", "new_zeros", "new_ones",
    "new_full", "slice",
}  # fmt: skip
_SIZED = _SHAPED | {"view", "_unsafe_view", "sym_size"}


def batch_of(example: Tensor, size: int) -> Tensor:
    """Returns a batch of `size` images, the example's in turn."""
    batch = torch.cat([example] * -(-size // example.shape[0]))[:size]
    if size == example.shape[0] and batch.stride() != example.stride():
        return example.detach()  # a model may ask for its strides
    return batch


def require_paddable(
    model: nn.Module,
    example: Tensor,
    graphs: Mapping[int, Graph],
    state: State,
    capture: Capture,
) -> None:
    """Raises ValueError if filling up a batch with zeros may change the answers for its images, or
    if the forward differs between batch sizes.

    Args:
        capture: captures the model as the graphs were captured.
    """
    images = images_at_all_sizes(graphs, state)
    if images is not None:
        require_any_batch(model, example, max(graphs))
        if 1 not in graphs:
            one, _ = capture(model, batch_of(example, 1))
            require_same_for_one(one, graphs[max(graphs)], images)


def require_any_batch(model: nn.Module, example: Tensor, most: int) -> None:
    """Raises ValueError unless the forward is the same for batches of 2 to `most` images."""
    several = batch_of(example, most)
    batch = torch.export.Dim("batch", max=most)
    try:
        undone = SideEffects(model).observed()
        with torch.no_grad(), warnings.catch_warnings(), undone:
            warnings.simplefilter("ignore")
            program = torch.export.export(
                model, (several,), dynamic_shapes=({0: batch},), strict=False
            )
            program = program.run_decompositions({})
    except Exception as error:  # export raises whatever it meets
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{_NOT_POSSIBLE}the forward is not the same for all batch sizes ({said})"
        ) from error
    given = {spec.arg.name for spec in program.graph_signature.input_specs
             if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT}  # fmt: skip
    of_images: set[fx.Node] = {node for node in program.graph.nodes if node.name in given}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if any(source in of_images for source in node.all_input_nodes if _is_tensor(source)):
            of_images.add(node)
        _require_sizes_only(node, node in of_images)


def _require_sizes_only(node: fx.Node, of_images: bool) -> None:
    """Raises ValueError if a node uses the batch size for anything but the size of a result."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return  # arithmetic on sizes
    name = node.target._schema.name.split("::")[1]
    if name.startswith(("_assert", "sym_constrain")):
        return
    sizes = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), _SYMBOLIC)]
    if sizes and name not in _SIZED:
        raise ValueError(f"{_NOT_POSSIBLE}{node.target} is given the size of the batch")
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return
    along = [dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
    if len(along) > 1:
        raise ValueError(f"{_NOT_POSSIBLE}{node.target} has the size of the batch twice")
    reads = [s for s in node.all_input_nodes if _is_tensor(s)]
    if not of_images and not along and any(_has_symbols(s.meta["val"]) for s in reads):
        raise ValueError(f"{_NOT_POSSIBLE}{node.target} computes something of the batch's size")


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), _SYMBOLIC)


def _has_symbols(value: object) -> bool:
    return isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def require_same_for_one(one: Graph, several: Graph, images: Sequence[Images]) -> None:
    """Raises ValueError unless the graph for one image equals that for several except in sizes:
    torch treats a size of one specially (squeeze, broadcasting)."""
    same = one.spec == several.spec and _without_sizes(one) == _without_sizes(several)
    for a, b, where in zip(one.outputs, several.outputs, images, strict=True):
        shape = several.values[b].shape
        shape = (*shape[: where.dim], where.each, *shape[where.dim + 1 :])
        same = same and one.values[a].shape == shape
    if not same:
        raise ValueError(f"{_NOT_POSSIBLE}for a single image the forward computes something else")


def _without_sizes(graph: Graph) -> str:
    """Returns all operations of a graph as text. Those that make what is derived go by their
    order: their names tell sizes, too."""
    nodes = [replace(node, name="") for node in graph.derived] + [*graph.nodes]
    lines = [(node.name, unsized(node.op), node.inputs, state_read_by(node.op)) for node in nodes]
    text = "\n".join(map(str, lines))
    for at, node in enumerate(graph.derived):
        text = text.replace(node.name, f"derived {at}")
    return text


def unsized(op: Operation) -> Operation | str:
    """Returns an operation without the sizes that depend on the batch."""
    if isinstance(op, Conv):
        return replace(op, problem=replace(op.problem, n=1))
    if isinstance(op, Torch) and op.target.split(".")[1] in _SHAPED:
        return op.target
    return op
