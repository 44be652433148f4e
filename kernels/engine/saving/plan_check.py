"""Whether a plan that was read is one that build_engine could have made: everything that follows
from the graph is inferred again, and must be what the file says. Where values lie, and how long,
is never read from a file.
"""

import contextlib
import json
import logging
import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import can_be_chunked, inner_candidates
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Graph,
    MaxPool,
    Mean,
    Node,
    Norm,
    Pick,
    Torch,
    Value,
    state_read_by,
)
from resfuse.kernels.engine.ir.torch_operations import is_pure
from resfuse.kernels.engine.planning.chunking import IMAGES
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.tactics import TACTICS, TacticModule, eager, tactics_on
from resfuse.kernels.ops.activation import ACTIVATIONS
from resfuse.kernels.ops.conv_problem import MATH_MODES

Plan = tuple[Graph, tuple[Segment, ...]]
_MOST_NODES = 10_000  # ResNet-1202 has 1,900 once merged
_MOST = 2**31  # of any size, stride, padding
_CONTAINERS = ("builtins.list", "builtins.tuple", "builtins.dict", "collections.OrderedDict")


class Unsound(ValueError):
    """What does not fit in a plan."""


def sound(
    plans: Mapping[int, Plan],
    state: Mapping[str, Tensor],
    device: torch.device,
    allow: Collection[str],
) -> dict[int, Plan]:
    """The plans, their candidates those that this version's tactics offer.

    Args:
        allow: names of operations that may run beside those known to only compute.

    Raises:
        Unsound: something does not fit.
    """
    if not plans:
        raise Unsound("there is none")
    first = next(iter(plans.values()))[0]
    checked = {}
    for size, (graph, segments) in plans.items():
        _require_wired(graph)
        shape, own = graph.values[graph.input].shape, first.values[first.input].shape
        same = (size, *own[1:]) == shape and size > 0 and graph.spec == first.spec
        if not same or len(graph.outputs) != len(first.outputs):
            raise Unsound(f"the plan for a batch of {size} takes or returns something else")
        _require_spec(graph.spec, len(graph.outputs))
        _Inference(graph, state, device, allow).require()
        tactics = tactics_on(device, graph.values[graph.input].dtype)
        checked[size] = graph, tuple(_offered(graph, segments, tactics))
    return checked


def _require_wired(graph: Graph) -> None:
    """Types as the classes of graph.py say, and every node reads what is there before it."""
    if len(graph.nodes) > _MOST_NODES:
        raise Unsound(f"{len(graph.nodes)} nodes; at most {_MOST_NODES}")
    names = (graph.input, *graph.outputs, *graph.constants, graph.spec)
    if not all(isinstance(name, str) for name in names) or not graph.input:
        raise Unsound("names that are no text")
    if graph.layout is not None:
        rank = len(graph.values[graph.input].shape)
        numbers = all(type(n) is int and n >= 0 for n in graph.layout)
        if not numbers or len(graph.layout) not in (rank, rank + 1):
            raise Unsound(f"an input that lies as {graph.layout}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, value in graph.values.items():
        if not all(type(n) is int and 0 <= n < _MOST for n in value.shape):
            raise Unsound(f"value {name} has shape {value.shape}")
        if math.prod(value.shape) * value.dtype.itemsize > memory:
            raise Unsound(f"value {name} is larger than this machine's memory")
    made = {graph.input}
    for node in graph.nodes:
        for part in (node.op, *_parts_of(node.op)):
            _require_types(node.name, part)
        if node.name in made or not isinstance(node.name, str):
            raise Unsound(f"node {node.name} is there twice")
        if not made.issuperset(node.inputs):
            raise Unsound(f"node {node.name} reads what is not there yet")
        made.add(node.name)
    if not made.issuperset(graph.outputs) or made != set(graph.values) or not graph.outputs:
        raise Unsound("values that no node makes, or outputs that are no values")


def _parts_of(op: Any) -> list[Any]:
    return [getattr(op, f.name) for f in fields(op) if is_dataclass(getattr(op, f.name))]


def _require_types(name: str, op: Any) -> None:
    hints = typing.get_type_hints(type(op))
    for field in fields(op):
        if not _fits(getattr(op, field.name), hints[field.name]):
            raise Unsound(f"{name} has {field.name} {getattr(op, field.name)!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; a bool is no number, and a number no larger than
    sizes are."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint and (hint is not int or abs(value) < _MOST)


def _require_spec(spec: str, leaves: int) -> None:
    """How the outputs make up the result: lists, tuples and dicts of as many tensors. torch would
    import what a file names as the type of others."""
    try:
        _, root = json.loads(spec)
    except (ValueError, TypeError, RecursionError):
        raise Unsound("the result is made up of nothing that is known") from None
    found, waiting = 0, [root]
    while waiting:
        item = waiting.pop()
        kind, below = item.get("type"), item.get("children_spec")
        if kind is None and below == []:
            found += 1
        elif kind in _CONTAINERS and isinstance(below, list):
            waiting += below
        else:
            raise Unsound(f"the result is made up of {kind}")
    if found != leaves:
        raise Unsound(f"the result has {found} tensors, and the graph {leaves} outputs")


class _Inference:
    """Shapes and dtypes of a graph's values, as they follow from its input and the state."""

    def __init__(
        self,
        graph: Graph,
        state: Mapping[str, Tensor],
        device: torch.device,
        allow: Collection[str],
    ) -> None:
        self._graph, self._state, self._device, self._allow = graph, state, device, allow
        self._fake = FakeTensorMode()

    def require(self) -> None:
        """Raises Unsound unless they are what the graph says."""
        for node in self._graph.nodes:
            value = self._graph.values[node.name]
            inputs = [self._graph.values[name] for name in node.inputs]
            if isinstance(node.op, Torch):
                accepted = [self._of_torch(node, node.op, inputs)]
            else:
                shapes = self._of_ours(node, inputs)
                accepted = [Value(shape, self._dtype) for shape in shapes]
                if any(v.dtype != self._dtype for v in inputs):
                    raise Unsound(f"{node.name} reads values of several dtypes")
            if value not in accepted:
                raise Unsound(f"{node.name} is said to be {value}, and is {accepted}")

    @property
    def _dtype(self) -> torch.dtype:
        return self._graph.values[self._graph.input].dtype

    def _of_ours(self, node: Node, inputs: list[Value]) -> list[tuple[int, ...]]:
        """The shapes that the result of one of the graph's own operations may have."""
        op = node.op
        joins = isinstance(op, Concat)
        more = getattr(op, "gate", False) + (node.residual is not None)
        if not inputs or (not joins and len(inputs) != 1 + more):
            raise Unsound(f"{node.name} has {len(inputs)} inputs")
        x = inputs[0].shape
        if len(x) not in (2, 4) or min(x) < 1:
            raise Unsound(f"{node.name} reads maps of shape {x}")
        if isinstance(op, Conv):
            return self._conv(node, op, [v.shape for v in inputs])
        if isinstance(op, Affine):
            return self._affine(node, op, [v.shape for v in inputs])
        if isinstance(op, Concat):
            same = all((s[0], *s[2:]) == (x[0], *x[2:]) for s in (v.shape for v in inputs))
            return [(x[0], sum(v.shape[1] for v in inputs), *x[2:])] if same else []
        if len(x) != 4:
            raise Unsound(f"{node.name} reads maps of shape {x}")
        n, c, h, w = x
        if isinstance(op, Mean):
            return [(n, c), (n, c, 1, 1)]
        if isinstance(op, Pick):
            inside = all(
                0 <= i < size for ids, size in ((op.rows, h), (op.columns, w)) for i in ids
            )
            if not inside or not op.rows or not op.columns or op.zeros < 0:
                raise Unsound(f"{node.name} picks pixels that are not there")
            return [(n, c + op.zeros, len(op.rows), len(op.columns))]
        assert isinstance(op, MaxPool | AveragePool)
        return [self._pooled(node, op, x)]

    def _conv(self, node: Node, op: Conv, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        p, x = op.problem, shapes[0]
        whole = min(p.n, p.c, p.h, p.w, p.k, p.r, p.s, p.groups, *p.stride, *p.dilation) > 0
        if not whole or min(p.padding) < 0 or p.c % p.groups or p.k % p.groups:
            raise Unsound(f"{node.name} is no convolution")
        if min(p.p, p.q) < 1 or x != ((p.n, p.c, p.h, p.w) if len(x) == 4 else (p.n, p.c)):
            raise Unsound(f"{node.name} convolves {x}")
        if len(x) == 2 and (p.h, p.w) != (1, 1):
            raise Unsound(f"{node.name} convolves {x}")
        stored, _ = MATH_MODES.get(p.math_mode, (None, 0))
        if stored != self._dtype or (p.math_mode == "tf32" and self._device.type != "cuda"):
            raise Unsound(f"{node.name} computes in {p.math_mode}")
        of_each = p.c // p.groups
        self._require_state(
            node, op.weight, [(p.k, of_each, p.r, p.s), (p.k, of_each * p.r * p.s)], self._dtype
        )
        if op.bias is not None:
            self._require_state(node, op.bias, [(p.k,)], self._dtype)
        self._require_epilogue(node, op, p.k, p.residual)
        shape: tuple[int, ...] = (p.n, p.k, p.p, p.q)
        accepted = [shape, shape[:2]] if (p.p, p.q) == (1, 1) else [shape]
        own = self._graph.values[node.name].shape
        if p.residual and shapes[-1] != own:
            raise Unsound(f"{node.name} adds {shapes[-1]}")
        return accepted

    def _affine(
        self, node: Node, op: Affine, shapes: list[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        x = shapes[0]
        if op.gate and (op.norm is not None or shapes[1] != (*x[:2], 1, 1)):
            raise Unsound(f"{node.name} is gated by {shapes[1]}")
        if op.residual and shapes[-1] != x:
            raise Unsound(f"{node.name} adds {shapes[-1]}")
        self._require_epilogue(node, op, x[1], op.residual)
        return [x]

    def _require_epilogue(
        self, node: Node, op: Conv | Affine, channels: int, residual: bool
    ) -> None:
        """A norm, activation and slope that fit, and no order of a sum that is not there."""
        if isinstance(op.norm, Norm):
            for name in (op.norm.mean, op.norm.var, op.norm.weight, op.norm.bias):
                if name is not None:
                    self._require_state(node, name, [(channels,)])
        if op.activation not in ACTIVATIONS or (op.residual_last and not residual):
            raise Unsound(f"{node.name} ends with {op.activation}")
        wanted = {"leaky_relu": (int, float), "prelu": (str,)}.get(op.activation, (type(None),))
        if not isinstance(op.slope, wanted):
            raise Unsound(f"{node.name} has slope {op.slope!r}")
        if isinstance(op.slope, str):
            one, each = self._state_of(node, op.slope).numel() == 1, (channels,)
            self._require_state(
                node, op.slope, [tuple(self._state_of(node, op.slope).shape)] if one else [each]
            )

    def _state_of(self, node: Node, name: str) -> Tensor:
        if name not in self._state:
            raise Unsound(f"{node.name} reads {name}, which the file does not hold")
        return self._state[name]

    def _require_state(
        self,
        node: Node,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype | None = None,
    ) -> None:
        tensor = self._state_of(node, name)
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tuple(tensor.shape) not in shapes or not fits:
            raise Unsound(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; accepted: {shapes[0]}")

    def _pooled(self, node: Node, op: MaxPool | AveragePool, x: tuple[int, ...]) -> tuple[int, ...]:
        dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
        sound = min(*op.kernel, *op.stride, *dilation) > 0 and all(
            0 <= pad <= kernel // 2 for pad, kernel in zip(op.padding, op.kernel, strict=True)
        )
        if not sound or (isinstance(op, AveragePool) and op.divisor == 0):
            raise Unsound(f"{node.name} is no pool")
        with self._fake:
            pooled = eager.function_of(node, self._graph.values, {})(torch.empty(x))
        return tuple(pooled.shape)

    def _of_torch(self, node: Node, op: Torch, inputs: list[Value]) -> Value:
        """What torch says that the operation gives; it is asked without memory."""
        if not (is_pure(op.target) or op.target in self._allow):
            raise Unsound(
                f"{op.target} is not known to only compute; load_engine(path, "
                f"allow=[{op.target!r}]) runs it all the same"
            )
        for arg in [*op.args, *dict(op.kwargs).values()]:
            self._require_argument(node, arg)
        with self._fake, _not_logged():
            state = {
                name: self._fake.from_tensor(self._state_of(node, name))
                for name in state_read_by(op)
            }
            given = [torch.empty(v.shape, dtype=v.dtype, device=self._device) for v in inputs]
            made = eager.function_of(node, self._graph.values, state)(*given)
        if not isinstance(made, Tensor) or made.layout != torch.strided:
            raise Unsound(f"{node.name} is no tensor")
        if made.device.type != self._device.type:
            raise Unsound(f"{node.name} is on {made.device}")
        return Value(tuple(made.shape), made.dtype)

    def _require_argument(self, node: Node, arg: Any) -> None:
        if isinstance(arg, list | tuple):
            for item in arg:
                self._require_argument(node, item)
        elif isinstance(arg, dict):
            ((kind, what),) = arg.items()
            known = {
                "value": lambda: type(what) is int and 0 <= what < len(node.inputs),
                "state": lambda: what in self._state,
                "device": lambda: torch.device(what).type == self._device.type,
                "dtype": lambda: isinstance(getattr(torch, what), torch.dtype),
                "memory_format": lambda: isinstance(getattr(torch, what), torch.memory_format),
                "layout": lambda: getattr(torch, what) is torch.strided,
            }
            if kind not in known or not isinstance(what, int | str) or not known[kind]():
                raise Unsound(f"{node.name} is given {arg}")
        elif not (arg is None or isinstance(arg, bool | int | float | str)):
            raise Unsound(f"{node.name} is given {arg!r}")


@contextlib.contextmanager
def _not_logged() -> Iterator[None]:
    """torch writes a traceback for what a fake tensor refuses, though the exception says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _offered(
    graph: Graph, segments: Sequence[Segment], tactics: Mapping[str, TacticModule]
) -> Iterable[Segment]:
    """The segments, if they cover the graph, with the candidates as the tactics offer them."""
    at = 0
    for segment in segments:
        candidate, other = segment.candidate, segment.runner_up
        for ms in (segment.ms, *([segment.runner_up_ms] if other else [])):
            if not _fits(ms, float) or ms is None or ms < 0:
                raise Unsound(f"a segment takes {ms!r} ms")
        if candidate.start != at or (other and (other.start, other.stop) != (at, candidate.stop)):
            raise Unsound(f"nothing computes node {at}, or two segments do")
        yield replace(
            segment,
            candidate=_as_offered(graph, candidate, tactics),
            runner_up=other and _as_offered(graph, other, tactics),
        )
        at = candidate.stop
    if at != len(graph.nodes):
        raise Unsound(f"nothing computes node {at}")


def _as_offered(
    graph: Graph, candidate: Candidate, tactics: Mapping[str, TacticModule]
) -> Candidate:
    if candidate.tactic not in tactics or not 0 <= candidate.start < len(graph.nodes):
        raise Unsound(f"no tactic {candidate.tactic} is meant for this device")
    if candidate.tactic in IMAGES:
        return _as_chunked(graph, candidate, tactics)
    for offered in tactics[candidate.tactic].segments(graph, candidate.start):
        if offered == candidate:
            return offered
    raise Unsound(f"{candidate.label()} does not compute {graph.nodes[candidate.start].name}")


def _as_chunked(
    graph: Graph, candidate: Candidate, tactics: Mapping[str, TacticModule]
) -> Candidate:
    """A candidate of chunks: its own candidates are offered for the part, and go without
    torch's."""
    count, part = candidate.settings["count"], graph.part(candidate.start, candidate.stop)
    images, rest = divmod(graph.batch_size, count) if type(count) is int and count > 0 else (0, 1)
    known = rest == 0 and (count == 1 or images in IMAGES[candidate.tactic])
    if not known or not part.nodes or not can_be_chunked(part):
        raise Unsound(f"{candidate.label()} is no way to part {graph.batch_size} images")
    inner, at = [], 0
    for one in inner_candidates(candidate):
        in_arena = TACTICS[candidate.tactic].in_arena
        if (
            one.start != at
            or one.tactic in IMAGES
            or (in_arena and not TACTICS[one.tactic].in_arena)
        ):
            raise Unsound(f"{one.label()} cannot be in chunks")
        own = _as_offered(part, one, tactics)
        inner.append((own.tactic, own.start, own.stop, own.config))
        at = own.stop
    if at != len(part.nodes):
        raise Unsound(f"nothing computes node {at} of a chunk")
    settings = (("count", count), ("inner", tuple(inner)))
    return Candidate(candidate.tactic, candidate.start, candidate.stop, settings)
