"""Replaces chains of layers in a module's graph by the steps that compute them, and compiles it."""

import linecache
import operator

import torch.fx as fx
from torch import nn

from resfuse.kernels.fusion.layers.compound_layers import FusedStep, ProjectionStep, StemStep
from resfuse.kernels.fusion.layers.conv_region import ConvRegion
from resfuse.kernels.fusion.layers.fast_path import FastPath, Forward
from resfuse.kernels.fusion.layers.fold_cache import Fold
from resfuse.kernels.fusion.layers.fused_layers import ConvStep
from resfuse.kernels.fusion.layers.norm_step import NormStep
from resfuse.kernels.fusion.matching.match import Chain
from resfuse.kernels.fusion.planning.plan import STEPS
from resfuse.kernels.fusion.tracing.module_tracing import has_hooks

Folds = dict[tuple[nn.Module, nn.Module | None], Fold]  # of a convolution and its batch norm


def rewrite(
    graph: fx.Graph,
    module: nn.Module,
    chains: list[Chain],
    prefix: str,
    folds: Folds,
    fast_path: FastPath,
) -> dict[str, FusedStep]:
    """Replaces every chain by a call of its step, in place.

    Args:
        graph: of the module.
        chains: found in it.
        prefix: of the steps' attribute names.
        folds: those of the module's other graphs, added to.
        fast_path: of this graph, to which its steps report.

    Returns:
        The steps by attribute name.
    """
    nodes: dict[fx.Node, FusedStep] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for chain in chains:
        target = f"{STEPS}.{prefix}{chain.name.replace('.', '_')}"
        node = replace_chain(graph, chain, target, replaced)
        if chain.conv is None:
            nodes[node] = NormStep(chain)
        else:
            fold = folds.setdefault((chain.conv, chain.norm), Fold())
            nodes[node] = ConvStep(chain, fold, fast_path)
    _merge_projections(graph, nodes)
    _merge_stem(graph, module, nodes)
    return {attribute_of(node): step for node, step in nodes.items()}


def replace_chain(
    graph: fx.Graph, chain: Chain, target: str, replaced: dict[fx.Node, fx.Node]
) -> fx.Node:
    """Puts one call of `target` where a chain was.

    Args:
        replaced: ends of chains replaced before -> what stands there now; added to.
    """
    read = [chain.source] if chain.added is None else [chain.source, chain.added]
    inputs = [replaced.get(node, node) for node in read]  # the end of a chain done before
    with graph.inserting_after(chain.end):
        node = graph.create_node("call_module", target, tuple(inputs))
    chain.end.replace_all_uses_with(node)
    replaced[chain.end] = node
    for layer in reversed(chain.nodes):
        graph.erase_node(layer)
    return node


def _merge_projections(graph: fx.Graph, nodes: dict[fx.Node, FusedStep]) -> None:
    """[h, x strided] @ [W3; Wd]: a 1x1 convolution takes in the 1x1 projection it is added to."""
    for node, step in list(nodes.items()):
        if not isinstance(step, ConvStep) or step.residual != "before" or not _is_1x1(step):
            continue
        source, added = node.args
        assert isinstance(added, fx.Node)
        projection = nodes.get(added)
        if (
            isinstance(projection, ConvStep)
            and _is_1x1(projection)
            and projection.activation == "identity"
            and projection.residual == "none"
            and len(added.users) == 1
            and step.geometry.stride == (1, 1)
        ):
            node.args = (source, added.args[0])
            graph.erase_node(added)
            del nodes[added]
            nodes[node] = ProjectionStep(step, projection)


def _merge_stem(graph: fx.Graph, module: nn.Module, nodes: dict[fx.Node, FusedStep]) -> None:
    """Merges a 7x7/2 convolution of an image with ReLU and the 3x3/2 max-pool after it."""
    for node, step in list(nodes.items()):
        if not isinstance(step, ConvStep) or not _is_stem(step) or len(node.users) != 1:
            continue
        (pool_node,) = node.users
        if pool_node.op != "call_module" or len(pool_node.args) != 1 or pool_node.kwargs:
            continue
        pool = module.get_submodule(str(pool_node.target))
        if type(pool) is nn.MaxPool2d and not has_hooks(pool) and _is_stem_pool(pool):
            pool_node.replace_all_uses_with(node)
            graph.erase_node(pool_node)
            nodes[node] = StemStep(step, pool)


def returns_a_step(graph: fx.Graph, steps: dict[str, FusedStep]) -> bool:
    """Whether the forward's result is what a convolution step has just made."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    made = output.args[0]
    return isinstance(made, fx.Node) and isinstance(
        steps.get(attribute_of(made)), ConvStep | ProjectionStep
    )


def overwrite_input(graph: fx.Graph, steps: dict[str, FusedStep]) -> bool:
    """Lets the step that adds the forward's input overwrite it, if that step reads it last.

    Returns:
        Whether there is such a step.
    """
    (x,) = (node for node in graph.nodes if node.op == "placeholder")
    last = max(x.users, key=list(graph.nodes).index, default=None)
    if last is None or len(last.args) != 2 or last.args[1] is not x or last.args[0] is x:
        return False
    step = steps.get(attribute_of(last))
    if not isinstance(step, ConvStep) or step.residual != "before":
        return False
    step.overwrite = True
    return True


def runs_unchecked(graph: fx.Graph, steps: dict[str, FusedStep]) -> bool:
    """Whether a graph may call its steps without their checks (fast_path.py).

    Each step must read the forward's input or other steps alone: then everything that a step checks
    follows from that input.
    """
    called = _called(graph, steps)
    for node in called:
        if isinstance(steps[attribute_of(node)], NormStep):
            return False
        read = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if any(arg.op != "placeholder" and arg not in called for arg in read):
            return False
    return bool(called)


def drop_checks(graph: fx.Graph, steps: dict[str, FusedStep]) -> None:
    """Makes a graph call its steps without their checks."""
    for node in _called(graph, steps):
        node.target = f"{node.target}.unchecked"


def join_convolutions(
    graph: fx.Graph, steps: dict[str, FusedStep], prefix: str
) -> dict[str, ConvRegion]:
    """Replaces steps that directly follow each other, and are convolutions, by a region of them.

    Args:
        graph: of which `runs_unchecked` is true.
        prefix: of the regions' attribute names.

    Returns:
        The regions by attribute name.
    """
    regions: dict[str, ConvRegion] = {}
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if _convolves(node, steps):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    for run in runs:
        inputs, outputs, region = _region(run, steps)
        if len(region) < 2:
            continue
        attribute = f"{prefix}_region_{len(regions)}"
        regions[attribute] = region
        with graph.inserting_before(run[0]):
            call = graph.create_node("call_module", f"{STEPS}.{attribute}", tuple(inputs))
            for i, node in enumerate(outputs):
                result = call
                if len(outputs) > 1:
                    result = graph.call_function(operator.getitem, (call, i))
                node.replace_all_uses_with(result)
        for node in reversed(run):
            graph.erase_node(node)
    return regions


def whole_region(graph: fx.Graph, steps: dict[str, FusedStep]) -> ConvRegion | None:
    """Returns all of a graph as a region, from its only input to its only result; None where it is
    more than convolutions.
    """
    first, *run, last = graph.nodes
    if not run or not all(_convolves(node, steps) for node in run) or last.args[0] not in run:
        return None
    inputs, outputs, region = _region(run, steps)
    return region if (inputs, outputs) == ([first], [last.args[0]]) else None


def _region(
    run: list[fx.Node], steps: dict[str, FusedStep]
) -> tuple[list[fx.Node], list[fx.Node], ConvRegion]:
    """Returns what a run of convolutions reads, what others read of it, and its region."""
    read = [arg for node in run for arg in node.args if isinstance(arg, fx.Node)]
    inputs = list(dict.fromkeys(arg for arg in read if arg not in run))
    region = ConvRegion(len(inputs))
    values = {node: number for number, node in enumerate(inputs)}
    for node in run:
        numbers = [values[arg] for arg in node.args if isinstance(arg, fx.Node)]
        values[node] = region.add(steps[attribute_of(node)], numbers)
    outputs = [node for node in run if any(user not in run for user in node.users)]
    region.returns([values[node] for node in outputs])
    return inputs, outputs, region


def _convolves(node: fx.Node, steps: dict[str, FusedStep]) -> bool:
    step = steps.get(attribute_of(node))
    return step is not None and ConvRegion.takes(step)


def _called(graph: fx.Graph, steps: dict[str, FusedStep]) -> list[fx.Node]:
    return [node for node in graph.nodes if attribute_of(node) in steps]


def compile_forward(graph: fx.Graph, name: str) -> Forward:
    """Compiles a graph to a function `forward(self, ...)` whose source tracebacks can show."""
    code = graph.python_code(root_module="self")
    file = f"<resfuse {name}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    space = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    forward: Forward = space["forward"]
    return forward


def replace_view_with_reshape(graph: fx.Graph) -> None:
    """x.view(...) of a channels_last tensor may not exist where x.reshape(...) does."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"


def _is_1x1(step: ConvStep) -> bool:
    geometry = step.geometry
    return step.conv.kernel_size == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1


def _is_stem(step: ConvStep) -> bool:
    conv, geometry = step.conv, step.geometry
    return (
        conv.kernel_size == (7, 7)
        and geometry == type(geometry)((2, 2), (3, 3), (1, 1), 1)
        and conv.in_channels <= 4
        and step.activation == "relu"
        and step.residual == "none"
    )


def _is_stem_pool(pool: nn.MaxPool2d) -> bool:
    def pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value, value) if isinstance(value, int) else tuple(value)

    return (
        pair(pool.kernel_size) == (3, 3)
        and pair(pool.stride) == (2, 2)
        and pair(pool.padding) == (1, 1)
        and pair(pool.dilation) == (1, 1)
        and not pool.ceil_mode
        and not pool.return_indices
    )


def attribute_of(node: fx.Node) -> str:
    """Returns the attribute name of the step that a node calls."""
    return str(node.target).rpartition(".")[2]
