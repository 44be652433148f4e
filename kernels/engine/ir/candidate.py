"""Candidate: one tactic, in one configuration, for neighbouring nodes of a graph."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from resfuse.kernels.engine.ir.graph import (
    Affine,
    Concat,
    Conv,
    Convert,
    Graph,
    GroupNorm,
    LayerNorm,
    Node,
    Pick,
    Torch,
)


@dataclass(frozen=True)
class Candidate:
    """A way to compute nodes [start, stop) of a graph by `tactic`.

    Attributes:
        config: the tactic's own settings, of JSON's types.
    """

    tactic: str
    start: int
    stop: int
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.config)

    def at_start(self) -> "Candidate":
        """Returns the candidate with positions counted from its own first node."""
        return Candidate(self.tactic, 0, self.stop - self.start, self.config)

    def label(self) -> str:
        """Returns a name for tables, such as `native direct by_channel=True`."""
        words = [str(v) if k == "form" else f"{k}={_short(v)}" for k, v in self.config]
        return " ".join([self.tactic, *words])


def _short(value: Any) -> str:
    """Returns a value as text, and a plan within a candidate as eight digits of its hash."""
    if not isinstance(value, tuple):
        return str(value)
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def key_of(part: Graph) -> str:
    """Returns what the time of a part depends on as text: its operations, shapes, wiring and what
    is computed in place, but no names."""
    numbers = {name: i for i, name in enumerate([*part.reads, *(n.name for n in part.nodes)])}
    words = []
    for node in part.nodes:
        shapes = ["x".join(map(str, part.values[name].shape)) for name in node.inputs]
        wires = ",".join(f"{numbers[n]}:{s}" for n, s in zip(node.inputs, shapes, strict=True))
        source = ""
        if isinstance(node.op, Convert):
            source = f" of {part.values[node.inputs[0]].dtype}"
        in_place = " in place" * (node.inplace_input in part.dead_inputs)
        words.append(f"{_describe(node)}{source} ({wires}){in_place}")
    dtype = str(part.values[part.nodes[0].name].dtype).removeprefix("torch.")
    return f"{'; '.join(words)} {dtype}"


def _describe(node: Node) -> str:
    op = node.op
    if isinstance(op, Conv):
        problem = op.problem
        windows = f"stride {problem.stride} pad {problem.padding} dilation {problem.dilation}"
        rest = f"{windows} {problem.activation} {problem.math_mode}"
        last = " residual_last" * op.residual_last
        return f"conv {problem.label()} {rest}{' residual' * problem.residual}{last}"
    if isinstance(op, Affine):
        norm = "norm " * (op.norm is not None)
        last = " residual_last" * op.residual_last + " gate" * op.gate
        return f"affine {norm}{op.activation}{' residual' * op.residual}{last}"
    if isinstance(op, Pick):
        channels = ""
        if op.channels is not None:
            channels = f" {len(op.channels)} channels{' scattered' * op.scatters}"
        zeros = f" zeros {op.zeros}" * (op.zeros > 0)
        around = f" around {op.around}" * any(op.around)
        return f"Pick {len(op.rows)}x{len(op.columns)}{channels}{zeros}{around}"
    if isinstance(op, LayerNorm):
        return f"layer_norm{' weight' * bool(op.weight)}{' bias' * bool(op.bias)}"
    if isinstance(op, GroupNorm):
        affine = f"{' weight' * bool(op.weight)}{' bias' * bool(op.bias)}"
        last = " residual_last" * op.residual_last
        ending = f"{op.activation}{' residual' * op.residual}{last}"
        return f"group_norm {op.groups}{affine} {ending}"
    if isinstance(op, Torch):
        return f"{op.target} {op.args} {dict(op.kwargs)}"
    settings = " ".join(f"{k} {v}" for k, v in asdict(op).items())
    return f"{type(op).__name__} {settings}".strip() if not isinstance(op, Concat) else "Concat"
