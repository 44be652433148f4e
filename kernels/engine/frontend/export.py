"""Captures a model as a Graph by torch.export."""

import hashlib
import operator
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from resfuse.kernels.engine.frontend.call_arguments import arguments
from resfuse.kernels.engine.frontend.channel_picks import add_part
from resfuse.kernels.engine.frontend.functional_graph import functional_graph
from resfuse.kernels.engine.frontend.graph_builder import Captured
from resfuse.kernels.engine.frontend.layout_questions import LayoutQuestions
from resfuse.kernels.engine.frontend.merge import merge
from resfuse.kernels.engine.frontend.operations import OPERATIONS, RESHAPES, SAME_VALUES
from resfuse.kernels.engine.frontend.quantized_pairs import PAIRS
from resfuse.kernels.engine.frontend.side_effects import SideEffects, Unreadable
from resfuse.kernels.engine.ir.derived_state import is_derivable, needed
from resfuse.kernels.engine.ir.graph import Graph, Node, Torch
from resfuse.kernels.observation.engine_capture import capturing
from resfuse.kernels.observation.observer import undrawn

aten = torch.ops.aten


def capture(model: nn.Module, example: Tensor) -> tuple[Graph, dict[str, Tensor]]:
    """Returns the graph of `model` in eval mode for inputs like `example`, and its state by name,
    with what the graph derives.

    Raises:
        ValueError: the model cannot be exported, most often because its control flow depends on
            data; or its forward has side effects, writes to buffers included.
    """
    effects, questions, settled = SideEffects(model), LayoutQuestions(), False
    with capturing(), effects.observed():
        program, graph = _exported(model, example, questions)
        effects.undo()  # torch has put back copies of lists
        if effects.change is not None:
            settled = _settles(model, example, effects)
        elif effects.asks_type and not example.is_meta:
            _require_equal(model, example, program)
    if effects.change is not None and not settled:
        raise ValueError(
            f"argument model: {effects.change} in its forward; an engine would answer with the "
            "value it had; accepted: models that only compute"
        )
    reader = _Reader(program, graph)
    layout = questions.layout_of(example)
    merged = merge(replace(reader.graph(), device=example.device, layout=layout))
    return replace(merged, derived=needed(merged.nodes, reader.read.derived)), reader.read.state


def is_in_training(model: nn.Module) -> bool:
    """Returns whether a model is in training mode. A graph that calls no module, as a program of
    torch.export, computes what it did when it was captured, says that it is in training mode all
    the same, and refuses eval(): it is so where it has dropout that is on."""
    if not any(module.training for module in model.modules()):
        return False
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    if not nodes or any(n.op == "call_module" and n.target != "_guards_fn" for n in nodes):
        return True
    dropouts = [n for n in nodes if "dropout" in str(n.target)]
    return any(arg is True for n in dropouts for arg in (*n.args, *n.kwargs.values()))


def _exported(
    model: nn.Module, example: Tensor, questions: LayoutQuestions
) -> tuple[torch.export.ExportedProgram, fx.Graph]:
    """Returns the program of a model, and its graph in operations that write to nothing."""
    program: torch.export.ExportedProgram
    try:
        with torch.no_grad():
            with questions, warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was assigned during export", UserWarning)
                program = torch.export.export(model, (example,), strict=False)
            graph = functional_graph(program)
            if graph is None:
                program = program.run_decompositions({})
                graph = program.graph
    except Unreadable:
        raise
    except Exception as error:  # export raises whatever it meets
        _require_no_address(model, questions)
        said = str(error).strip().splitlines()
        raise ValueError(
            f"argument model: {type(model).__name__} cannot be exported: "
            f"{said[0] if said else type(error).__name__}"
        ) from error
    _require_no_address(model, questions)
    for spec in program.graph_signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            raise ValueError(
                f"argument model: {type(model).__name__} writes to {spec.target} in eval mode; "
                "accepted: models that only compute"
            )
    return program, graph


def _require_no_address(model: nn.Module, questions: LayoutQuestions) -> None:
    if questions.by_address is not None:
        raise ValueError(
            f"argument model: {type(model).__name__} calls {questions.by_address}() in its "
            "forward, and an engine's tensors lie elsewhere; accepted: models that only compute"
        )


def _settles(model: nn.Module, example: Tensor, effects: SideEffects) -> bool:
    """Returns whether only the model's first forward has side effects, and later ones answer the
    same."""
    x = _other_numbers(example)
    try:
        with torch.no_grad():
            return effects.settle(lambda: model(x.clone()))
    except Exception:  # a forward that raises, and torch's capture of it did not
        return False


def _require_equal(
    model: nn.Module, example: Tensor, program: torch.export.ExportedProgram
) -> None:
    """Raises ValueError unless the captured program answers as the model does."""
    x = _other_numbers(example)
    with torch.no_grad(), undrawn():
        torch.manual_seed(0)
        want = pytree.tree_leaves(model(x.clone()))
        torch.manual_seed(0)
        answers = pytree.tree_leaves(program.module()(x.clone()))
    for one, other in zip(answers, want, strict=True):
        if isinstance(other, Tensor) and not torch.allclose(
            one, other, rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            raise ValueError(
                f"argument model: {type(model).__name__} asks type() in its forward, and torch "
                "answers otherwise while it captures; accepted: isinstance()"
            )


def _other_numbers(example: Tensor) -> Tensor:
    x = example.detach()
    if not x.is_floating_point():
        return x
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(0)
    return x + torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)


class _Reader:
    """Turns an exported program into a Graph.

    Args:
        graph: of the program, in ATen operations that write to nothing.
    """

    def __init__(self, program: torch.export.ExportedProgram, graph: fx.Graph) -> None:
        self.read = Captured({name: t.detach() for name, t in program.state_dict.items()})
        self._several: dict[fx.Node, Torch] = {}  # of several results each, derived from the state
        self._constants: list[str] = []
        self._program, self._graph = program, graph

    def graph(self) -> Graph:
        signature = self._program.graph_signature
        inputs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                spec = inputs[node.target]  # whose name may have a number
                if spec.kind == InputKind.USER_INPUT:
                    self.read.add_value(node, node.target)
                else:
                    self.read.states[node] = self._name_of(spec)
            elif node.op == "call_function":
                self._call(node)
        (output,) = (node for node in self._graph.nodes if node.op == "output")
        returned = [self._returned(item) for item in output.args[0]]
        (input_name,) = signature.user_inputs
        out_spec = self._program.call_spec.out_spec
        try:
            spec = pytree.treespec_dumps(out_spec)
        except NotImplementedError as error:  # a named tuple of the model's own, say
            raise ValueError(
                f"argument model: it returns a {out_spec.type.__name__}; accepted: tensors, and "
                "lists, tuples and dicts of them"
            ) from error
        return Graph(
            str(input_name), tuple(returned), tuple(self.read.nodes), self.read.values, spec,
            tuple(self._constants),
        )  # fmt: skip

    def _name_of(self, spec: InputSpec) -> str:
        """Returns the name of an input in the state.

        A constant that the forward creates may differ between batch sizes under torch's one name
        for it, so a hash of its content becomes part of its name.
        """
        name = str(spec.target)
        if name in self._program.state_dict:
            return name
        constant = self._program.constants[name].detach()
        if spec.kind == InputKind.CONSTANT_TENSOR:
            content = constant.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            name = f"{name}:{hashlib.sha256(content).hexdigest()[:12]}"
        self._constants.append(name)
        self.read.state[name] = constant
        return name

    def _returned(self, item: Any) -> str:
        name = self.read.states.get(item) if isinstance(item, fx.Node) else None
        if name in [node.name for node in self.read.derived]:
            self.read.add(item, Torch("aten.clone.default", ({"state": name},)))
        if not isinstance(item, fx.Node) or not any(item in named for named in self.read.named):
            raise ValueError(
                f"argument model: it returns {item!r}, which does not depend on its input; "
                "accepted: outputs computed from the input"
            )
        return self.read.name_of(item)

    def _call(self, node: fx.Node) -> None:
        read, target, args = self.read, node.target, arguments(node)
        if target is operator.getitem:
            if args[0] in self._several:
                one = replace(self._several[args[0]], result=int(args[1]))
                read.states[node] = read.derive(one)
            elif args[1] == 0 and read.names[args[0]] in read.values:
                read.same(node, args[0])  # the result of a batch norm; its statistics are not read
            elif not add_part(read, node):
                self._one_of_several(node)
        elif target is aten._assert_tensor_metadata.default:
            pass  # true of the example, and the engine takes inputs like it only
        elif target in SAME_VALUES and any(args[0] in named for named in read.named):
            read.same(node, args[0])
        elif not (add := OPERATIONS.get(target, PAIRS.get(str(target)))) or not add(read, node):
            self._torch(node)

    def _one_of_several(self, node: fx.Node) -> None:
        """Adds one result of an operation with several results, as a call of its own."""
        source, which = arguments(node)
        call = next(n for n in self.read.nodes if n.name == self.read.names[source])
        assert isinstance(call.op, Torch)
        self.read.add_value(node, node.name)
        one = Torch(call.op.target, call.op.args, call.op.kwargs, int(which))
        self.read.nodes.append(Node(node.name, one, call.inputs))

    def _torch(self, node: fx.Node) -> None:
        """Adds an operation that torch runs, its arguments encoded as plain data.

        Views become reshapes, since not every view exists of a value in the engine's layouts.
        """
        inputs: list[fx.Node] = []

        def encode(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                if arg in self.read.states:
                    return {"state": self.read.states[arg]}
                self.read.name_of(arg)
                inputs.append(arg)
                return {"value": len(inputs) - 1}
            if isinstance(arg, list | tuple):
                return [encode(a) for a in arg]
            if isinstance(arg, torch.dtype | torch.device | torch.memory_format | torch.layout):
                return {type(arg).__name__: str(arg).removeprefix("torch.")}
            if arg is None or isinstance(arg, bool | int | float | str):
                return arg
            raise ValueError(f"argument model: {node.target} takes {arg!r}, which cannot be kept")

        target = aten.reshape.default if node.target in RESHAPES else node.target
        args = tuple(encode(a) for a in node.args)
        kwargs = tuple((key, encode(value)) for key, value in node.kwargs.items())
        if not isinstance(target, torch._ops.OpOverload):
            raise ValueError(
                f"argument model: {target} is no operation of torch's; accepted: models without "
                "data-dependent control flow"
            )
        meta = node.meta.get("val")
        op = Torch(str(target), args, kwargs)
        if not inputs and isinstance(meta, Tensor | list | tuple) and is_derivable(op):
            if isinstance(meta, Tensor):
                self.read.states[node] = self.read.derive(op)
            else:
                self._several[node] = op
            return
        if isinstance(meta, Tensor):
            self.read.add_value(node, node.name)
        elif isinstance(meta, list | tuple):
            self.read.names[node] = node.name  # each result is a node of its own
        else:
            raise ValueError(
                f"argument model: {target} returns no tensor; accepted: models without "
                "data-dependent control flow"
            )
        self.read.nodes.append(Node(node.name, op, tuple(self.read.names[x] for x in inputs)))
