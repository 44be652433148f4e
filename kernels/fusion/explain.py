"""explain: what fuse did to a model, a line a convolution, and how much of the work that is."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.kernels.cpu.onednn import multiplies_tiles
from resfuse.kernels.cpu.packed_conv import refusal
from resfuse.kernels.fusion.fuse import unfused
from resfuse.kernels.fusion.layers.compound_layers import FusedStep, convolutions
from resfuse.kernels.fusion.layers.fused_layers import ConvStep
from resfuse.kernels.fusion.matching.layer_kinds import copied
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.fusion.planning.plan_builder import plans_of
from resfuse.kernels.fusion.training.training_layers import steps_of
from resfuse.kernels.fusion.training.training_plan import training_plan_of
from resfuse.kernels.fusion.training.training_plan_builder import plans_for_training
from resfuse.kernels.observation.observer import undrawn

EXAMPLE_SIZE = 224  # pixels, where no example is given


@dataclass(frozen=True)
class Line:
    """One convolution of a model, as explain describes it."""

    name: str
    shape: str  # C -> K RxS /stride
    fused: bool
    how: str  # what it is fused with, or why it was left alone
    macs: int | None  # multiply-accumulates an image; None where no example could be run
    precision: str = ""  # in an eager call on a CPU, and why; "" where all is in the model's own


@dataclass(frozen=True)
class Explanation:
    """Every convolution of a model. `str()` is a table."""

    lines: tuple[Line, ...]
    norms: tuple[str, ...]  # batch norms that run with their activation, without a convolution
    note: str = ""
    fused_in_training: tuple[str, ...] | None = None  # chains' names; None: it was not asked for
    left_in_training: tuple[tuple[str, str], ...] = ()  # a batch norm's name, and why it was left

    @property
    def share(self) -> float | None:
        """Returns the fused share of the convolutions' MACs, 0 to 1, None if MACs are unknown."""
        if any(line.macs is None for line in self.lines):
            return None
        total = sum(line.macs or 0 for line in self.lines)
        done = sum(line.macs or 0 for line in self.lines if line.fused)
        return done / total if total else 0.0

    def left(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if not line.fused)

    def __str__(self) -> str:
        in_training = (
            f"left in training mode: {name}: {why}" for name, why in self.left_in_training
        )
        return "\n".join([*_table(self.lines), *in_training, self.summary()])

    def summary(self) -> str:
        if not self.lines:
            return f"no 2-D convolution in this model: nothing was changed{self.note}"
        fused = sum(line.fused for line in self.lines)
        words = f"{fused} of {len(self.lines)} convolutions fused"
        if self.share is not None:
            words += f", {100 * self.share:.1f} % of their MACs"
        narrow = sum(line.precision == "bf16" for line in self.lines)
        if narrow:
            words += f"; {narrow} in bf16"
        if self.norms:
            words += f"; {len(self.norms)} batch norms fused with what follows them"
        if self.fused_in_training is not None:
            fused = len(self.fused_in_training)
            words += f"; in training mode {fused} of {fused + len(self.left_in_training)} batch"
            words += " norms fused"
        return f"{words}{self.note}"


def explain(model: nn.Module, example: Any = None) -> Explanation:
    """Says of every convolution what it was fused with, or why not, and its share of the MACs.

    Args:
        model: fused, or not: of an unfused model the lines say what `fuse` would do.
        example: what the model takes, to count MACs: a tensor [N, C, H, W], or a tuple of
            arguments. Without one a zero image of 224 x 224 is tried.

    Raises:
        ValueError: the model refuses the example given.
    """
    found = _what_is_done(model)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    macs, note = _count_macs(model, convs, example)
    lines = tuple(
        Line(
            name,
            _shape(conv),
            *found.of(name),
            macs[name] if macs is not None else None,
            found.precision(name, conv),
        )
        for name, conv in convs.items()
    )
    note += _not_read(model)
    is_fused = any(plan_of(module) is not None for module in model.modules())
    if lines and not is_fused:
        note += "; this is what fuse would do: the model is not fused"
    return Explanation(lines, tuple(found.norms), note, *_in_training(model))


def _not_read(model: nn.Module) -> str:
    """Returns a note on convolutions of other dimensions and on TorchScript modules."""
    kinds = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    others = Counter(type(m).__name__ for m in model.modules() if isinstance(m, kinds))
    words = "".join(f"; {number} {name} left as they are" for name, number in others.items())
    scripted = sum(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    return f"{words}; {scripted} TorchScript modules not read" if scripted else words


class _Found:
    def __init__(self) -> None:
        self.how: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.norms: dict[str, None] = {}  # in order, each once: a module has a step for every call
        self.precisions: dict[str, str] = {}

    def of(self, name: str) -> tuple[bool, str]:
        if name in self.how:
            return True, self.how[name]
        return False, self.reasons.get(name, "no forward that could be read calls it")

    def precision(self, name: str, conv: nn.Conv2d) -> str:
        if name in self.precisions or not self.precisions:
            return self.precisions.get(name, "")
        return f"{_NAMES.get(conv.weight.dtype, '')}: not fused"


def _what_is_done(model: nn.Module) -> _Found:
    found = _Found()
    with unfused(model):
        found_plans = plans_of(model)
    for name, module, planned in found_plans:
        prefix = f"{name}." if name else ""
        plan = plan_of(module) or planned.plan
        for step in plan.steps.values() if plan is not None else ():
            _add(found, prefix, step)
        for layer, reason in planned.unfused.items():
            found.reasons[prefix + layer] = reason
    return found


def _in_training(
    model: nn.Module,
) -> tuple[tuple[str, ...] | None, tuple[tuple[str, str], ...]]:
    """Returns the names fused in training mode, None if that was not asked for, and the reasons for
    the others by name."""
    if all(training_plan_of(module) is None for module in model.modules()):
        return None, ()
    fused: dict[str, None] = {}
    reasons: dict[str, str] = {}
    with unfused(model):
        found = list(plans_for_training(model))
    for name, _, plan in found:
        prefix = f"{name}." if name else ""
        fused |= {prefix + own.name: None for step in plan.steps.values() for own in steps_of(step)}
        reasons |= {prefix + norm: reason for norm, reason in plan.unfused.items()}
    return tuple(fused), tuple(reasons.items())


def _add(found: _Found, prefix: str, step: FusedStep) -> None:
    layers = convolutions(step)
    if not layers:
        found.norms[prefix + step.name] = None
    for layer in layers:
        found.how[prefix + layer.name] = step.chain if layer is layers[0] else "projection inside"
        if precision := _precision(layer):
            found.precisions[prefix + layer.name] = precision


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _precision(layer: ConvStep) -> str:
    """Returns what a layer computes in on a CPU, and why; "" where nothing but float32 is asked
    for.
    """
    weight, asked = layer.conv.weight, layer.fold.asked
    if asked == "kept":
        return "fp32: kept"
    if (asked != "bf16" and weight.dtype != torch.bfloat16) or weight.is_cuda:
        return ""
    reason = refusal(weight, layer.geometry, layer.activation, "bf16")
    if reason is None and multiplies_tiles(weight.dtype):
        reason = "it multiplies tiles (AMX)"
    if reason is None:
        return "bf16"
    return f"fp32: {reason}" if weight.dtype == torch.float32 else f"bf16 by torch: {reason}"


def _count_macs(
    model: nn.Module, convs: dict[str, nn.Conv2d], example: Any
) -> tuple[dict[str, int] | None, str]:
    if not convs:
        return {}, ""
    with unfused(model):
        model = _twin(model)
    convs = {name: conv for name, conv in model.named_modules() if name in convs}
    given = example is not None
    if not given:
        weight = next(iter(convs.values())).weight
        shape = (1, next(iter(convs.values())).in_channels, EXAMPLE_SIZE, EXAMPLE_SIZE)
        example = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    arguments = example if isinstance(example, tuple) else (example,)
    counts = dict.fromkeys(convs, 0)
    hooks = [conv.register_forward_hook(_counter(counts, name)) for name, conv in convs.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with unfused(model), torch.no_grad(), undrawn():
            model(*arguments)
    except Exception as error:  # foreign models raise what they like
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if given:
            raise ValueError(
                f"argument example: the model refuses it ({reason}); accepted: what it takes"
            ) from error
        return None, "; give explain an example to count MACs"
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    images = next((a.shape[0] for a in arguments if isinstance(a, Tensor)), 1)
    return {name: count // images for name, count in counts.items()}, ""


def _twin(model: nn.Module) -> nn.Module:
    """Returns a copy of the model to run, since its forward may write to attributes, or the model
    itself if it cannot be copied."""
    try:
        return copied(model)
    except Exception:  # torch's, of parametrized and pruned layers
        return model


def _counter(counts: dict[str, int], name: str) -> Any:
    def hook(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts[name] += output.numel() * conv.weight[0].numel()

    return hook


def _shape(conv: nn.Conv2d) -> str:
    words = f"{conv.in_channels} -> {conv.out_channels} {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    if conv.stride != (1, 1):
        words += f" /{conv.stride[0]}"
    return f"{words} groups {conv.groups}" if conv.groups != 1 else words


def _table(lines: tuple[Line, ...]) -> Iterator[str]:
    total = sum(line.macs or 0 for line in lines)
    last = "precision" if any(line.precision for line in lines) else ""
    rows = [("convolution", "shape", "MACs", "", "", last)]
    for line in lines:
        share = f"{100 * line.macs / total:.1f} %" if line.macs is not None and total else ""
        fused = "fused" if line.fused else "left"
        rows.append((line.name, line.shape, share, fused, line.how, line.precision))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i == 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
