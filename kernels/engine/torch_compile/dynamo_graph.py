"""Turns a graph of dynamo's, which takes weights and sizes as arguments, into a module of one
input.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import SymFloat, SymInt, Tensor, nn
from torch.utils._sympy.symbol import SymT, symbol_is_type

Size = int | SymInt


class Unsuitable(ValueError):
    """Says why an engine cannot run a graph."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a graph of one input, by their positions.

    Attributes:
        x: the input.
        weights: tensors of modules, and any that the call is not given, by names for them.
        sizes: integers, as symbols where dynamo has left them free.
        numbers: floats that dynamo hands over as tensors, which the graph reads by item().
        shape: of the input, with symbols likewise.
    """

    x: int
    weights: Mapping[str, int]
    sizes: Mapping[int, Size]
    numbers: Mapping[int, SymFloat]
    shape: tuple[Size, ...]


def arguments_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Arguments:
    """Returns what the arguments of a graph are.

    Raises:
        Unsuitable: it has no input, or several, or arguments of another kind.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    inputs: list[int] = []
    weights: dict[str, int] = {}
    sizes: dict[int, Size] = {}
    numbers: dict[int, SymFloat] = {}
    for at, (node, example) in enumerate(zip(nodes, example_inputs, strict=True)):
        if isinstance(example, int | SymInt):
            sizes[at] = example
        elif not isinstance(example, Tensor):
            raise Unsuitable(f"it takes a {type(example).__name__}; an engine takes one tensor")
        elif (number := _number(node)) is not None:
            numbers[at] = number
        elif isinstance(example, nn.Parameter) or _is_static(node, example):
            weights[_name_of(node, weights)] = at
        else:
            inputs.append(at)
    if len(inputs) != 1:
        raise Unsuitable(f"it takes {len(inputs) or 'no'} tensors; an engine takes one")
    shape = tuple(nodes[inputs[0]].meta["example_value"].shape)
    return Arguments(inputs[0], weights, sizes, numbers, shape)


def module_of(
    gm: fx.GraphModule,
    arguments: Arguments,
    example_inputs: Sequence[Any],
    free: Collection[int] = (),
) -> fx.GraphModule:
    """Returns the graph as a module of its one input, on the weights of `example_inputs`.

    Args:
        free: dimensions of the input whose sizes are read from it; all others are numbers.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    names = {at: name for name, at in arguments.weights.items()}
    root: dict[str, Any] = {name: example_inputs[at] for at, name in names.items()}
    values: dict[fx.Node, Any] = {}
    for at, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if at == arguments.x:
            values[node] = x
        elif at in names:
            values[node] = graph.get_attr(names[at])
        elif at in arguments.numbers:
            values |= dict.fromkeys(node.users, arguments.numbers[at].node.hint)
        else:
            dim = dim_of(arguments, at)
            values[node] = (
                graph.call_method("size", (x, dim)) if dim in free else hint(arguments.sizes[at])
            )
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in values:
            continue
        if node.op in ("get_attr", "call_module"):
            root[node.target] = _attribute(gm, node.target)
        values[node] = graph.node_copy(node, lambda each: values[each])
        values[node].meta = {}
    return fx.GraphModule(root, graph).eval()


def dim_of(arguments: Arguments, at: int) -> int | None:
    """Returns the dimension of the input whose size is the argument at a position, if any is."""
    wanted = arguments.sizes[at]
    if isinstance(wanted, SymInt):
        for dim, size in enumerate(arguments.shape):
            if isinstance(size, SymInt) and size.node.expr == wanted.node.expr:
                return dim
    return None


def hint(size: Size) -> int:
    """Returns the size in the call that is being compiled, without a guard on it."""
    if not isinstance(size, SymInt):
        return size
    found = size.node.hint
    assert isinstance(found, int)
    return found


def require_own_memory(gm: fx.GraphModule) -> None:
    """
    Raises:
        Unsuitable: results share memory with an argument or each other. An engine returns copies,
            and a later write to one would not reach the other.
    """
    given = {_storage(node) for node in gm.graph.find_nodes(op="placeholder")} - {None}
    seen: set[int | None] = set()
    for node in _outputs(gm):
        storage = _storage(node)
        if storage in given:
            raise Unsuitable("it returns a view of its input or of a weight")
        if storage is not None and storage in seen:
            raise Unsuitable("two of its results share their memory")
        seen.add(storage)


def _storage(node: Any) -> int | None:
    """Returns what tells the memory of a node's tensor from others, None where there is none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def _outputs(gm: fx.GraphModule) -> list[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    return list(dict.fromkeys(output.args[0]))


def output_orders(gm: fx.GraphModule) -> list[tuple[int, ...] | None]:
    """Returns the order of each output's dimensions in memory as dynamo has promised it to the code
    behind the graph: the one of the largest stride first. None for what is no tensor."""
    (output,) = gm.graph.find_nodes(op="output")
    orders: list[tuple[int, ...] | None] = []
    for item in output.args[0]:
        value = item.meta.get("example_value") if isinstance(item, fx.Node) else None
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            orders.append(None)
            continue
        strides = [hint(stride) for stride in value.stride()]
        orders.append(tuple(sorted(range(value.dim()), key=lambda dim: -strides[dim])))
    return orders


def _number(node: fx.Node) -> SymFloat | None:
    """Returns the float that an argument stands for, where it is no tensor of the user's: the
    symbols of those say that nothing backs them."""
    memo = getattr(node.meta.get("example_value"), "item_memo", None)
    if not isinstance(memo, SymFloat) or not symbol_is_type(memo.node._expr, SymT.FLOAT):
        return None
    read = all(user.op == "call_method" and user.target == "item" for user in node.users)
    return memo if read else None


def _is_static(node: fx.Node, tensor: Tensor) -> bool:
    """Returns whether dynamo has found a tensor in a module, a global or an enclosing function, and
    not among a call's arguments."""
    said = _source(node)
    marked = getattr(tensor, "_dynamo_static_input_type", None) is not None
    return marked or said.startswith("G[") or "__closure__" in said


def _source(node: fx.Node) -> str:
    """Returns where dynamo has found an argument, as Python: `L['x']`."""
    source = getattr(node, "_dynamo_source", None)
    return str(source.name) if source is not None else ""


def _name_of(node: fx.Node, taken: Collection[str]) -> str:
    """Returns a name such as `layer1.0.conv1.weight`, where it is not taken."""
    name = ".".join(re.findall(r"_(?:modules|parameters|buffers)\['(\w+)'\]", _source(node)))
    # One tensor may have the name of another function argument's module.
    clashes = any(
        f"{one}.".startswith(f"{other}.")
        for each in taken
        for one, other in ((each, name), (name, each))
    )
    return str(node.name) if not name or clashes else name


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part)
    return found
