"""Run by torchrun in two processes: batch norm over both, against fp64 over the whole batch.

Prints a line of JSON a case, {"case": ..., "errors": {what: relative error, the worse of both}}.
Both processes draw the same whole batch and take their share of it. Kernels are interpreted, on CPU
tensors, where there is no GPU; where there is one, both use it.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from kernel_inputs import DEVICE
from resfuse.kernels import fuse
from resfuse.kernels.fusion.training import training_layers
from resfuse.kernels.fusion.training.training_mode import operations_anywhere
from resfuse.kernels.fusion.training.training_plan import training_plan_of
from resfuse.kernels.gpu.batch_norm.batch_statistics import bn_partials_op
from resfuse.kernels.gpu.batch_norm.bn_add_relu import Norm, bn_add_relu, bn_add_relu_op
from resfuse.kernels.gpu.batch_norm.bn_conv1x1 import bn_conv1x1
from resfuse.kernels.gpu.batch_norm.sync_batch_norm import bn_gather_op

FORMS = ("nothing", "residual", "shortcut", "frozen shortcut", "frozen", "no relu", "conv1x1")
SPLITS = ((4, 1), (0, 3))  # images of either process
CHANNELS, FILTERS = 13, 6
Errors = dict[str, float]


def relative(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0 if got.shape == want.shape else float("inf")
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-3))


def share(split: tuple[int, int]) -> slice:
    return slice(0, split[0]) if dist.get_rank() == 0 else slice(split[0], sum(split))


# An op at a time


def drawn(images: int) -> dict[str, Tensor]:
    """x and what is added, away from zero mean and unit variance, and the vectors of two norms."""
    torch.manual_seed(images)
    shape = images, CHANNELS, 3, 5
    made = {name: 2 * torch.randn(shape, dtype=torch.float64) + 3 for name in ("x", "added")}
    # so that the two processes' means differ by as much as the images' deviations
    made["x"] += torch.arange(images)[:, None, None, None]
    for name in ("weight", "bias", "weight2", "bias2"):
        made[name] = torch.randn(CHANNELS, dtype=torch.float64)
    made["filters"] = torch.randn(FILTERS, CHANNELS, 1, 1, dtype=torch.float64)
    for name, width in (("upstream", CHANNELS), ("upstream of conv1x1", FILTERS)):
        made[name] = torch.randn(images, width, 3, 5, dtype=torch.float64)
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def running() -> tuple[Tensor, Tensor]:
    ones = torch.ones(CHANNELS, dtype=torch.float64, device=DEVICE)
    return ones / 2, 2 * ones


def normed(x: Tensor, weight: Tensor, bias: Tensor, buffers: Any, training: bool) -> Tensor:
    """Batch norm with weight and bias [N, C], so that their gradients come image by image."""
    z = F.batch_norm(x, *buffers, None, None, training, 0.3, 1e-3)
    return z * weight[:, :, None, None] + bias[:, :, None, None]


def expected(whole: dict[str, Tensor], form: str, part: slice) -> dict[str, Tensor]:
    """Of this process's part, in fp64 from the whole batch; buffers from all of it."""
    own = {name: tensor.clone().requires_grad_() for name, tensor in whole.items()}
    images = len(whole["x"])
    vectors = {
        name: whole[name].expand(images, -1).clone().requires_grad_()
        for name in ("weight", "bias", "weight2", "bias2")
    }
    own |= vectors
    buffers, buffers2 = running(), running()
    y = normed(own["x"], own["weight"], own["bias"], buffers, form != "frozen")
    if "shortcut" in form:
        y = y + normed(own["added"], own["weight2"], own["bias2"], buffers2, form == "shortcut")
    if form == "residual":
        y = y + own["added"]
    y = y if form == "no relu" else F.relu(y)
    upstream = whole["upstream"]
    if form == "conv1x1":
        # filters, too, image by image: their gradient is each process's own
        own["filters"] = whole["filters"].expand(images, -1, -1, -1, -1).clone().requires_grad_()
        y = torch.einsum("nchw,nkcij->nkhw", y, own["filters"])
        upstream = whole["upstream of conv1x1"]
    y.backward(upstream)
    made = {"y": y.detach()[part], "mean": buffers[0], "var": buffers[1]}
    made |= {"mean2": buffers2[0], "var2": buffers2[1]}
    for name, leaf in own.items():
        if leaf.grad is not None:
            grad = leaf.grad[part]
            made[f"grad of {name}"] = grad if name in ("x", "added") else grad.sum(0)
    return made


def found(
    whole: dict[str, Tensor], form: str, part: slice, dtype: torch.dtype, group: str | None,
    op: Callable[..., Tensor] = bn_add_relu,
) -> dict[str, Tensor]:  # fmt: skip
    """What our kernels make of this process's part."""
    own = {}
    for name, tensor in whole.items():
        mine = tensor[part] if tensor.dim() == 4 and name != "filters" else tensor
        own[name] = mine.to(dtype, copy=True).requires_grad_()
    buffers, buffers2 = ([b.to(dtype) for b in running()] for _ in range(2))
    norm = Norm(own["weight"], own["bias"], *buffers, form != "frozen", 0.3, 1e-3, group)
    norm2 = Norm(own["weight2"], own["bias2"], *buffers2, form == "shortcut", 0.3, 1e-3, group)
    upstream = own["upstream"]
    if form == "conv1x1":
        y, _ = bn_conv1x1(own["x"], norm, own["filters"])
        upstream = own["upstream of conv1x1"]
    else:
        y = op(
            own["x"], norm, own["added"] if form == "residual" else None,
            shortcut=(own["added"], norm2) if "shortcut" in form else None,
            activation="identity" if form == "no relu" else "relu",
        )  # fmt: skip
    y.backward(upstream.detach())
    made = {"y": y.detach(), "mean": buffers[0], "var": buffers[1]}
    made |= {"mean2": buffers2[0], "var2": buffers2[1]}
    grads = {name: leaf.grad for name, leaf in own.items()}
    return made | {f"grad of {name}": grad for name, grad in grads.items() if grad is not None}


def op_errors(form: str, split: tuple[int, int], dtype: torch.dtype, **options: Any) -> Errors:
    whole, part = drawn(sum(split)), share(split)
    options = {"group": dist.group.WORLD.group_name} | options
    got, want = found(whole, form, part, dtype, **options), expected(whole, form, part)
    missing = set(got) ^ set(want)
    return {name: relative(got[name], want[name]) for name in want if name not in missing} | {
        name: float("inf") for name in missing
    }


def op_cases() -> Iterator[tuple[str, Errors]]:
    for form in FORMS:
        for split in SPLITS:
            yield f"{form} {split} fp32", op_errors(form, split, torch.float32)
        yield f"{form} (2, 3) fp64", op_errors(form, (2, 3), torch.float64)
    yield "shortcut (2, 2) fp32", op_errors("shortcut", (2, 2), torch.float32)
    yield "apart", op_errors("shortcut", (2, 2), torch.float32, group=None)
    compiled = torch.compile(bn_add_relu, fullgraph=True, backend="aot_eager")
    yield "compiled", op_errors("shortcut", (3, 1), torch.float32, op=compiled)


def well_behaved_operators() -> Errors:
    """Raises where one is not."""
    whole, group = drawn(2), dist.group.WORLD.group_name
    x, weight = whole["x"].float(), whole["weight"].float()
    torch.library.opcheck(bn_gather_op, (*bn_partials_op(x), group))
    tail = (weight, weight.abs(), weight.clone().requires_grad_(), *(None,) * 7)
    torch.library.opcheck(bn_add_relu_op, (x.requires_grad_(), *tail, True, False, True, group))
    return {}


# Whole networks


def network(block: Any, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A stem, a block without and a block with a projection."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), nn.ReLU()
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), norm(16))
    plain = block(8, 8 // block.expansion, norm_layer=norm)
    join = block(8, 16 // block.expansion, 2, projection, norm_layer=norm)
    return nn.Sequential(*stem, plain, join).train().to(DEVICE)


def varied() -> nn.Module:
    """With every option of a norm somewhere."""
    model = network(resnet.Bottleneck)
    model[4].downsample[1].momentum = None
    model[3].bn1.eval()
    model[4].bn3.eval()
    model[3].bn2 = nn.BatchNorm2d(2, affine=False, device=DEVICE)
    model[4].bn2 = nn.BatchNorm2d(4, track_running_stats=False, device=DEVICE)
    return model


def train(model: nn.Module, x: Tensor, images: int) -> Tensor:
    """A step of a loss that is a mean over all `images`, wherever they are."""
    y = model(x)
    (y.square().sum() / (images * y[0].numel() if len(y) else 1)).backward()
    return y.detach()


def network_errors(
    model: nn.Module, split: tuple[int, int], process_group: Any = None, alone: bool = False
) -> Errors:
    """After two steps and an evaluation. alone: each process by itself, with all of its part."""
    images, part = sum(split), share(split)
    x = torch.randn(images, 3, 9, 9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = copy.deepcopy(model).double()
    if not alone or process_group is not None:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    fused = fuse(model, training=True)
    plans = [training_plan_of(module) for module in fused.modules()]
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    taken = [
        own
        for p in plans
        if p
        for step in p.steps.values()
        for own in training_layers.steps_of(step)
    ]
    assert len(taken) == norms, f"{len(taken)} of {norms} norms fused"
    seen, errors = (x[part] if alone else x), {}
    mine = slice(None) if alone else part
    for _ in range(2):
        y, want = train(fused, x[part], len(seen)), train(exact, seen.double(), len(seen))
        errors["y"] = relative(y, want[mine])
    for (name, p), q in zip(fused.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        grad = p.grad.clone()
        if not alone:
            dist.all_reduce(grad)
        errors[f"grad of {name}"] = relative(grad, q.grad)
    for (name, p), q in zip(fused.named_buffers(), exact.named_buffers(), strict=True):
        assert name == q[0]
        errors[name] = relative(p, q[1].double())
    with torch.no_grad():
        # an untracked norm then takes the statistics of what this process was given
        errors["evaluated"] = relative(fused.eval()(x[part]), exact.eval()(x[part].double()))
    return errors


def network_cases() -> Iterator[tuple[str, Errors]]:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    yield "basic (2, 2)", network_errors(network(resnet.BasicBlock), (2, 2))
    for split in ((3, 1), (0, 3)):
        yield f"bottleneck {split}", network_errors(network(resnet.Bottleneck), split)
        yield f"varied {split}", network_errors(varied(), split)
    plain = network(resnet.Bottleneck)
    yield "plain norms stay apart", network_errors(plain, (2, 3), alone=True)
    yield "a group of one", network_errors(network(resnet.Bottleneck), (2, 3), alone, alone=True)


def torchs_error_on_a_cpu() -> Errors:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU())
    said = []
    for one in (model, fuse(model, training=True)):
        try:
            one(torch.randn(2, 3, 5, 5))
        except ValueError as error:
            said.append(str(error))
    assert len(said) == 2 and said[0] == said[1] and "on GPU" in said[0], said
    return {}


def cases() -> Iterator[tuple[str, Errors]]:
    yield "torch's error on a CPU", torchs_error_on_a_cpu()
    with operations_anywhere():
        yield "well-behaved operators", well_behaved_operators()
        yield from op_cases()
        yield from network_cases()


def main() -> None:
    dist.init_process_group("gloo")
    for name, errors in cases():
        largest = torch.tensor(list(errors.values()), dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            worst = dict(zip(errors, largest.tolist(), strict=True))
            print(json.dumps({"case": name, "errors": worst}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
    sys.stdout.flush()
    # gloo's threads may still hold tensors, and one that frees them while the interpreter ends
    # aborts the process (pytorch/pytorch#179291).
    os._exit(0)
