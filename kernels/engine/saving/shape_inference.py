"""Infers the shape and dtype of every value of a graph read from a file, and compares them with
what the file says, so that no number in it reaches memory that is not there.
"""

import contextlib
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from resfuse.kernels.engine.ir.derived_state import derive, derived_name, is_derivable
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Finished,
    Graph,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Mean,
    Node,
    Norm,
    Pick,
    SplitSoftmax,
    SplitSum,
    Torch,
    Value,
)
from resfuse.kernels.engine.ir.graph_state import state_read_by
from resfuse.kernels.engine.ir.torch_call import torch_call
from resfuse.kernels.engine.ir.torch_operations import is_pure
from resfuse.kernels.engine.saving.graph_structure import Unsound, memory_bytes
from resfuse.kernels.engine.saving.quantized_values import require_quantized
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.ops.activation import ACTIVATIONS
from resfuse.kernels.ops.quantization import QUANTIZED_DTYPES, STORED_ON


class ShapeInference:
    """Infers the shapes and dtypes of a graph's values from its input and the state."""

    def __init__(
        self,
        graph: Graph,
        state: Mapping[str, Tensor],
        device: torch.device,
        allow: Collection[str],
    ) -> None:
        self._graph, self._state, self._device, self._allow = graph, dict(state), device, allow
        self._fake = FakeTensorMode()

    def require(self) -> None:
        """Raises Unsound unless every value has the shape and dtype that the graph says."""
        self._derive()
        for name in self._graph.reads:
            self._require_storage(name, self._graph.values[name])
        for node in self._graph.nodes:
            value = self._graph.values[node.name]
            self._require_storage(node.name, value)
            inputs = [self._graph.values[name] for name in node.inputs]
            if isinstance(node.op, Torch):
                accepted = [self._of_torch(node, node.op, inputs)]
            elif isinstance(node.op, Convert):
                accepted = [self._converted(node, node.op, inputs)]
            else:
                shapes = self._of_ours(node, inputs)
                dtypes = self._stored(node, inputs)
                accepted = [Value(shape, dtype) for shape in shapes for dtype in dtypes]
                if any(v.dtype != inputs[0].dtype for v in inputs):
                    raise Unsound(f"{node.name} reads values of several dtypes")
            require_quantized(node, value, inputs)
            if replace(value, quantization=None) not in accepted:
                raise Unsound(f"{node.name} is said to be {value}, and is {accepted}")

    def _require_storage(self, name: str, value: Value) -> None:
        """Raises Unsound unless a quantised value lies as this device's kernels read it."""
        if value.quantization is not None and value.dtype != STORED_ON[self._device.type]:
            raise Unsound(f"{name} is {value.dtype}, and quantised for another device")

    def _derive(self) -> None:
        """Adds what the graph derives to the state.

        Raises:
            Unsound: some of it is no function of the state alone, has another's name, or is larger
                than this machine's memory.
        """
        room = memory_bytes()
        for node in self._graph.derived:
            op = node.op
            if not isinstance(op, Torch) or not is_derivable(op) or derived_name(op) != node.name:
                raise Unsound(f"{node.name} is not what is derived from the state")
            if node.name in self._state:
                raise Unsound(f"{node.name} is there twice")
            value = self._of_torch(node, op, [])
            room -= math.prod(value.shape) * value.dtype.itemsize
            if room < 0:
                raise Unsound("what is derived is larger than this machine's memory")
            self._state[node.name] = derive(op, self._state)

    @staticmethod
    def _stored(node: Node, inputs: list[Value]) -> list[torch.dtype]:
        """Returns the dtypes that the result of an operation other than torch's may have."""
        own = inputs[0].dtype
        if isinstance(node.op, Conv):
            stored = node.op.problem.dtypes.output
            return [own if stored == torch.uint8 else stored]
        wide = own in QUANTIZED_DTYPES and isinstance(node.op, Affine | Mean)
        return [own, torch.float32] if wide else [own]

    @staticmethod
    def _converted(node: Node, op: Convert, inputs: list[Value]) -> Value:
        """Returns the value that a conversion makes of float32, or float32 of another one."""
        between = {
            "bfloat16": [torch.float32],
            "uint8": [torch.float32],
            "int8": [torch.float32],
            "float32": [torch.bfloat16, *QUANTIZED_DTYPES],
        }
        if len(inputs) != 1 or inputs[0].dtype not in between.get(op.dtype, []):
            raise Unsound(f"{node.name} converts {[v.dtype for v in inputs]} to {op.dtype}")
        return Value(inputs[0].shape, getattr(torch, op.dtype))

    def _of_ours(self, node: Node, inputs: list[Value]) -> list[tuple[int, ...]]:
        """Returns the shapes that the result of an operation other than torch's may have."""
        op = node.op
        joins = isinstance(op, Concat)
        more = getattr(op, "gate", False) + (node.residual is not None)
        if not inputs or (not joins and len(inputs) != 1 + more):
            raise Unsound(f"{node.name} has {len(inputs)} inputs")
        x = inputs[0].shape
        if len(x) not in (2, 4) or min(x) < 1:
            raise Unsound(f"{node.name} reads maps of shape {x}")
        if isinstance(op, Conv):
            return self._conv(node, op, [v.shape for v in inputs], inputs[0].dtype)
        if isinstance(op, Affine):
            return self._affine(node, op, [v.shape for v in inputs])
        if isinstance(op, LayerNorm | GroupNorm):
            for name in filter(None, (op.weight, op.bias)):
                self._require_state(node, name, [x[1:2]])
            if op.eps < 0 or not inputs[0].dtype.is_floating_point:
                raise Unsound(f"{node.name} has eps {op.eps} and normalises {inputs[0].dtype}")
            if isinstance(op, GroupNorm):
                self._require_groups(node, op, [v.shape for v in inputs])
            return [x]
        if isinstance(op, SplitSum | SplitSoftmax):
            return self._split(node, op, [v.shape for v in inputs], inputs[0].dtype)
        if isinstance(op, Concat):
            same = all((s[0], *s[2:]) == (x[0], *x[2:]) for s in (v.shape for v in inputs))
            return [(x[0], sum(v.shape[1] for v in inputs), *x[2:])] if same else []
        if len(x) != 4:
            raise Unsound(f"{node.name} reads maps of shape {x}")
        n, c, h, w = x
        if isinstance(op, Mean):
            return [(n, c), (n, c, 1, 1)]
        if isinstance(op, Pick):
            channels = tuple(range(c)) if op.channels is None else op.channels
            picked = (channels, op.rows, op.columns)
            inside = all(
                0 <= i < size for ids, size in zip(picked, (c, h, w), strict=True) for i in ids
            )
            if not inside or not all(picked) or min(op.zeros, *op.around) < 0:
                raise Unsound(f"{node.name} picks what is not there")
            left, right, top, bottom = op.around
            size = top + len(op.rows) + bottom, left + len(op.columns) + right
            return [(n, len(channels) + op.zeros, *size)]
        assert isinstance(op, MaxPool | AveragePool)
        return [self._pooled(node, op, x)]

    def _conv(
        self, node: Node, op: Conv, shapes: list[tuple[int, ...]], dtype: torch.dtype
    ) -> list[tuple[int, ...]]:
        p, x = op.problem, shapes[0]
        whole = min(p.n, p.c, p.h, p.w, p.k, p.r, p.s, p.groups, *p.stride, *p.dilation) > 0
        if not whole or min(p.padding) < 0 or p.c % p.groups or p.k % p.groups:
            raise Unsound(f"{node.name} is no convolution")
        if min(p.p, p.q) < 1 or x != ((p.n, p.c, p.h, p.w) if len(x) == 4 else (p.n, p.c)):
            raise Unsound(f"{node.name} convolves {x}")
        if len(x) == 2 and (p.h, p.w) != (1, 1):
            raise Unsound(f"{node.name} convolves {x}")
        quantized = dtype in QUANTIZED_DTYPES
        if p.dtypes.input != (torch.uint8 if quantized else dtype) or (
            p.math_mode == "tf32" and self._device.type != "cuda"
        ):
            raise Unsound(f"{node.name} computes in {p.math_mode}")
        of_each = p.c // p.groups
        folded = {torch.float32} if quantized else {dtype}
        if dtype == torch.bfloat16:
            folded = {torch.bfloat16, torch.float32}
        self._require_state(
            node, op.weight, [(p.k, of_each, p.r, p.s), (p.k, of_each * p.r * p.s)], folded
        )
        if op.bias is not None:
            self._require_state(node, op.bias, [(p.k,)], folded)
        if op.correction is not None:
            self._require_state(node, op.correction, [(p.k,)], {torch.float32})
        if op.correction is not None and not quantized:
            raise Unsound(f"{node.name} has a correction in {dtype}")
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

    @staticmethod
    def _split(
        node: Node,
        op: SplitSum | SplitSoftmax,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> list[tuple[int, ...]]:
        x = shapes[0]
        if op.radix < 1 or x[1] % op.radix or not dtype.is_floating_point:
            raise Unsound(f"{node.name} has {op.radix} splits of {x[1]} channels in {dtype}")
        if isinstance(op, SplitSum):
            if op.gate and (len(x) != 4 or shapes[1] != (*x[:2], 1, 1)):
                raise Unsound(f"{node.name} is gated by {shapes[1]}")
            return [(x[0], x[1] // op.radix, *x[2:])]
        return [x[:2], (*x[:2], 1, 1)] if set(x[2:]) <= {1} else [x]

    def _require_groups(self, node: Node, op: GroupNorm, shapes: list[tuple[int, ...]]) -> None:
        """Raises Unsound unless groups divide the channels, and a residual has the same shape."""
        channels = shapes[0][1]
        if op.groups < 1 or channels % op.groups:
            raise Unsound(f"{node.name} has {op.groups} groups of {channels} channels")
        if shapes[-1] != shapes[0]:
            raise Unsound(f"{node.name} adds {shapes[-1]}")
        self._require_epilogue(node, op, channels, op.residual)

    def _require_epilogue(self, node: Node, op: Finished, channels: int, residual: bool) -> None:
        """Raises Unsound unless norm, activation and slope fit `channels`, and `residual_last` is
        set only with a residual."""
        if not isinstance(op, GroupNorm) and op.norm is not None:
            self._require_norm(node, op.norm, channels)
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

    def _require_norm(self, node: Node, norm: Norm, channels: int) -> None:
        """Raises Unsound unless a norm is a batch norm over `channels`, or a layer scale of as
        many."""
        shapes: list[tuple[int, ...]] = [(channels,)]
        if norm.mean is None or norm.var is None:
            factors = norm.weight, norm.bias
            if norm != Norm(None, None, *factors, 0.0) or factors == (None, None):
                raise Unsound(f"{node.name} has {norm}")
            ones = [((1,) * i, (1,) * j) for i in range(4) for j in range(4 - i)]
            shapes += [(*before, channels, *behind) for before, behind in ones]
        for name in (norm.mean, norm.var, norm.weight, norm.bias):
            if name is not None:
                self._require_state(node, name, shapes)

    def _state_of(self, node: Node, name: str) -> Tensor:
        if name not in self._state:
            raise Unsound(f"{node.name} reads {name}, which the file does not hold")
        return self._state[name]

    def _require_state(
        self,
        node: Node,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Collection[torch.dtype] | None = None,
    ) -> None:
        tensor = self._state_of(node, name)
        fits = tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes
        if tuple(tensor.shape) not in shapes or not fits:
            raise Unsound(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; accepted: {shapes[0]}")

    def _pooled(self, node: Node, op: MaxPool | AveragePool, x: tuple[int, ...]) -> tuple[int, ...]:
        dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
        pads: tuple[int, ...] = op.padding
        most = [kernel // 2 for kernel in op.kernel]
        if isinstance(op, MaxPool) and op.padding_after is not None:
            pads = (*op.padding, *op.padding_after)
            most = [d * (k - 1) for d, k in zip(dilation, op.kernel, strict=True)] * 2
        sound = min(*op.kernel, *op.stride, *dilation) > 0 and all(
            0 <= pad <= limit for pad, limit in zip(pads, most, strict=True)
        )
        if not sound or (isinstance(op, AveragePool) and op.divisor == 0):
            raise Unsound(f"{node.name} is no pool")
        with self._fake:
            dtype = self._graph.values[node.inputs[0]].dtype
            given = torch.empty(x, dtype=dtype if dtype in QUANTIZED_DTYPES else torch.float32)
            pooled = eager.function_of(node, self._graph.values, {})(given)
        return tuple(pooled.shape)

    def _of_torch(self, node: Node, op: Torch, inputs: list[Value]) -> Value:
        """Returns the shape and dtype of a torch operation's result, found with fake tensors."""
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
            result = torch_call(op, state)(*given)
        if not isinstance(result, Tensor) or result.layout != torch.strided:
            raise Unsound(f"{node.name} is no tensor")
        if result.device.type != self._device.type:
            raise Unsound(f"{node.name} is on {result.device}")
        return Value(tuple(result.shape), result.dtype)

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
    """Silences torch's log of fake tensors, which repeats each exception as a traceback."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
