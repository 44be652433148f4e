"""fuse, unfuse and fused: faster layers for a model whose modules stay the same objects.

model = fuse(torchvision.models.resnet50().eval())
with torch.inference_mode():
    model(images)
print(explain(model, images))
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resfuse.kernels.cpu.cpus import require_threads
from resfuse.kernels.fusion.fused_module import attach, detach, empty_plan
from resfuse.kernels.fusion.layers.fold_cache import Asked, require_weights
from resfuse.kernels.fusion.layers.norm_step import NormStep
from resfuse.kernels.fusion.matching.layer_kinds import DTYPES, copied
from resfuse.kernels.fusion.parity import require_parity
from resfuse.kernels.fusion.planning.known_forwards import known_forwards, pass_through_plan
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.fusion.planning.plan_builder import plans_of
from resfuse.kernels.fusion.planning.sequential_inplace import sequence_plan
from resfuse.kernels.fusion.training.training_plan import training_plan_of
from resfuse.kernels.fusion.training.training_plan_builder import plans_for_training
from resfuse.kernels.ops.asked_precision import Precision


def fuse(
    model: nn.Module,
    example: Tensor | None = None,
    *,
    inplace: bool = False,
    discard_weights: bool = False,
    training: bool = False,
    weights: Literal["follow", "frozen"] = "follow",
    threads: int | None = None,
    precision: str | None = None,
    keep: Sequence[str] = (),
) -> nn.Module:
    """Fuses every conv-BN(-activation)(-add) it understands; `explain` says which.

    The result has the parameters, buffers, names and hooks of `model`. In eval mode and without
    gradients it computes with folded weights, which follow the parameters when those change; in
    training mode it does what `model` does, and with `training` does that fused, too. Answers lie
    in memory as the model's do: contiguous or channels_last.

    What is followed at once, on any device: writes that torch counts (in place, load_state_dict,
    also under inference_mode), tensors that are replaced, moved or restrided, and steps of all
    torch.optim optimizers. On a CPU also what torch does not count (`.data`, numpy, DLPack, another
    process, statistics), by the bytes: tensors up to 16 KB and networks up to 1 MB in full, of
    larger tensors a sample of 64 elements, and all bytes within 128 calls and at train(), eval(),
    to() and load_state_dict(). So a write past torch's counts to a few elements of a large weight
    may be followed up to 128 calls late; call eval() after it. On a GPU such writes are not seen
    until then. Compiled and exported graphs hold the weights of the last eval() or fuse().

    Args:
        model: any module, on one device, of floating-point weights.
        example: an input [N, C, H, W]; if given, the fused model's answer to it is compared with
            the original's.
        inplace: change `model` itself rather than a copy.
        discard_weights: free each convolution's own weight when its folded one has been laid out
            (at the first run), so that a model takes no more memory than before. It then cannot be
            trained, copied, unfused, or given other weights.
        training: fuse batch norm (SyncBatchNorm too, over the processes of its group) with what
            precedes and follows it in training mode, as well. On a GPU our kernels compute that,
            statistics in float32 always, but have no second derivatives; on a CPU torch's do, in
            place where that cannot be seen. Compiled models train on their layers.
        weights: "follow" them, as above; or "frozen": you promise not to write to them, so a
            call does not look. train(), eval(), to() and load_state_dict() still do.
        threads: that convolutions run on, on a CPU; by default as many as there are CPUs to use,
            and no more than torch.get_num_threads() says at the call.
        precision: what fused convolutions are computed in, "fp32" or "bf16", by default the model's
            own. With "bf16" a float32 model on a CPU still takes and returns float32; values and
            weights of its fused convolutions are rounded to bfloat16, sums, biases and slopes are
            float32. All other layers, the few convolutions that no native kernel computes, wanted
            gradients, training, and compiled or exported graphs see float32. `explain` says it
            layer by layer.
        keep: with "bf16", patterns as fnmatch has them ("layer4.*") of names of modules or
            parameters, whose convolutions are computed in float32.

    Raises:
        ValueError: `model` is no module, is on the meta device or on several, or has weights of a
            dtype that no kernel computes in; `example` does not fit it; the answers differ;
            weights are to be discarded and trained; `weights` is neither of the two; `threads`
            is no number of them; the precision is unknown, or not for this model or device; or a
            pattern of `keep` matches no layer.
    """
    require_threads(threads)
    wanted = Precision.asked(precision, keep)
    if weights not in ("follow", "frozen"):
        raise ValueError(f'argument weights: {weights!r}; accepted: "follow", "frozen"')
    _require_fusible(model)
    kept = _kept(model, wanted)
    if training and discard_weights:
        raise ValueError("argument discard_weights: True with training=True; accepted: False")
    fused_model = model if inplace else copied(model)
    _attach_plans(fused_model, training)
    known = known_forwards(fused_model)
    named = list(fused_model.named_modules())
    for name, module in reversed(named):  # the outermost plan comes last, and wins
        if (plan := plan_of(module)) is not None:
            plan.frozen = weights == "frozen"
            for step in plan.steps.values():
                if isinstance(step, NormStep):
                    step.threads = threads
            for layer in plan.layers:
                layer.fold.threads = threads
                layer.ask_for(_asked(f"{name}.{layer.name}.weight".removeprefix("."), wanted, kept))
            plan.take_over_submodules(module, known)
    if example is not None:
        computed = torch.bfloat16 if precision == "bf16" else example.dtype
        try:
            require_parity(fused_model, example, unfused(fused_model), computed)
        except ValueError:
            unfuse(fused_model)
            raise
    for module in fused_model.modules() if discard_weights else ():
        plan = plan_of(module)
        if plan is not None:
            plan.discard_weights()
    return fused_model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`, in place: the very modules `model` had run again.

    Raises:
        RuntimeError: their weights were discarded.
    """
    plans = {module: plan for module in model.modules() if (plan := plan_of(module)) is not None}
    require_weights(any(plan.has_discarded() for plan in plans.values()))
    for module in plans:
        detach(module)
    return model


@contextmanager
def fused(model: nn.Module) -> Iterator[nn.Module]:
    """Fuses a model inside `with fused(model):` and restores it afterwards."""
    fuse(model, inplace=True)
    try:
        yield model
    finally:
        unfuse(model)


@contextmanager
def unfused(model: nn.Module) -> Iterator[nn.Module]:
    """Runs the original layers inside `with unfused(model):`, without discarding plans and folded
    weights."""
    plans = [
        (module, plan, training_plan_of(module))
        for module in model.modules()
        if (plan := plan_of(module)) is not None
    ]
    for module, *_ in plans:
        detach(module)
    try:
        yield model
    finally:
        for module, plan, training in plans:
            attach(module, plan, training)


def _attach_plans(model: nn.Module, training: bool) -> None:
    """Plans every module of a model, and attaches the plans of those that have something to fuse.

    Args:
        training: attach plans for training mode, too.
    """
    found = plans_for_training(model) if training else ()
    in_training = {module: plan for _, module, plan in found if plan.steps}
    unfused: dict[str, str] = {}
    for _, module, planned in plans_of(model):
        unfused = planned.unfused if module is model else unfused
        if planned.plan is not None and plan_of(module) is None:
            attach(module, planned.plan, in_training.get(module))
    for module in reversed(list(model.modules())):  # a sequence may be a block of another one
        plan = sequence_plan(module) if plan_of(module) is None else None
        if plan is not None:
            attach(module, plan)
    plan = pass_through_plan(model, unfused)
    if plan is not None:
        attach(model, plan)
    for module, training_plan in in_training.items():
        if training_plan_of(module) is None:
            attach(module, plan_of(module) or empty_plan(module), training_plan)


def _asked(weight: str, precision: Precision, kept: set[str]) -> Asked:
    """Returns what the layer of a weight is to compute in."""
    if precision.name != "bf16":
        return "own"
    return "kept" if weight in kept else "bf16"


def _kept(model: nn.Module, precision: Precision) -> set[str]:
    """Returns the names of the convolutions' weights that are kept in float32.

    Raises:
        ValueError: the model cannot be computed in that precision, or a pattern matches no layer.
    """
    if precision.name is None:
        return set()
    layers = {
        f"{name}.weight".removeprefix("."): module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    for dtype in dict.fromkeys(weight.dtype for weight in layers.values()):
        device = next(weight.device for weight in layers.values())
        precision.require_fit(model, dtype, device)
    return precision.kept(layers)


def _require_fusible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"argument model: a {type(model).__name__}; accepted: a torch.nn.Module")
    for name, module in model.named_modules():
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(
                f"argument model: {name} has no weights yet; accepted: a model of lazy layers that "
                "has run once"
            )
    devices = {str(t.device) for t in [*model.parameters(), *model.buffers()]}
    if "meta" in devices:
        raise ValueError("argument model: on the meta device, without weights; accepted: cpu, cuda")
    if len(devices) > 1:
        raise ValueError(f"argument model: on {', '.join(sorted(devices))}; accepted: one device")
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Conv2d) else None
        if weight is not None and weight.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"argument model: {name}.weight is {weight.dtype}; accepted: {names}")
