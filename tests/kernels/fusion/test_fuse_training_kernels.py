"""fuse(model, training=True) on its kernels, in the interpreter where there is no GPU."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from resfuse.kernels import fuse
from resfuse.kernels.fusion.training.training_mode import operations_anywhere
from training_models import Pair, images, steps_in, train_step

pytestmark = pytest.mark.slow


@pytest.fixture
def on_kernels() -> Iterator[None]:
    """Steps run our kernels, in the interpreter where there is no GPU."""
    with operations_anywhere():
        yield


def one_stage(block: Any) -> nn.Module:
    """A stem, a block without and a block with a projection."""
    stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    plain = block(8, 8 // block.expansion)
    return nn.Sequential(*stem, plain, block(8, 16 // block.expansion, 2, projection)).train()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("frozen", [False, True])
def test_kernels_train_as_fp64_does(block: Any, frozen: bool, on_kernels: None) -> None:
    model = one_stage(block)
    model[4].downsample[1].momentum = None
    if frozen:
        model[3].bn1.eval()
        model[4].bn2.eval()
    exact = copy.deepcopy(model).double()
    fused = fuse(model, training=True)
    assert any("projection's norm inside" in chain for chain in steps_in(fused))
    takes_in = any(" -> conv + bn + add + relu" in chain for chain in steps_in(fused))
    assert takes_in == (block is resnet.Bottleneck)  # whose last convolution is 1x1
    x = images(size=11)
    for _ in range(2):
        y, want, eager = (train_step(m, x.to(next(m.parameters()).dtype)) for m in
                          (fused, exact, model))  # fmt: skip
        assert relative(y, want) < 2 * relative(eager, want) + 1e-6
    for (name, p), q, r in zip(
        fused.named_parameters(), exact.parameters(), model.parameters(), strict=True
    ):
        # a bias's gradient is a sum of which most cancels: 2e-6 of it are left to its order
        assert relative(p.grad, q.grad) < 2 * relative(r.grad, q.grad) + 1e-5, name  # type: ignore[arg-type]
    for (name, p), q in zip(fused.named_buffers(), exact.buffers(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=1e-5, atol=1e-6), name


def test_kernels_under_autocast(on_kernels: None) -> None:
    """Convolutions in bf16, statistics and parameters' gradients in fp32."""
    model = one_stage(resnet.BasicBlock)
    exact = copy.deepcopy(model).double()
    fused = fuse(model, training=True)
    x = images(size=11)
    with torch.autocast("cpu", torch.bfloat16):
        y = train_step(fused, x)
        eager = train_step(model, x)
    want = train_step(exact, x.double())
    assert y.dtype == torch.bfloat16
    assert relative(y, want) < 2 * relative(eager, want) + 8e-3
    for p, q, r in zip(fused.parameters(), exact.parameters(), model.parameters(), strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert relative(p.grad, q.grad) < 2 * relative(r.grad, q.grad) + 8e-3  # type: ignore[arg-type]
    assert fused[1].running_var.dtype == torch.float32
    assert relative(fused[1].running_var, exact[1].running_var) < 1e-2


def test_kernels_under_checkpointing_and_without_gradients(on_kernels: None) -> None:
    model = one_stage(resnet.BasicBlock)
    fused = fuse(model, training=True)
    x = images(size=9)
    got, want = (checkpoint(m, x, use_reentrant=False) for m in (fused, model))
    got.square().mean().backward()
    want.square().mean().backward()
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        assert relative(p.grad, q.grad.double()) < 1e-4  # type: ignore[arg-type,union-attr]
    assert int(fused[1].num_batches_tracked) == int(model[1].num_batches_tracked)
    with torch.no_grad():
        assert relative(fused(x), model(x).double()) < 1e-5


@pytest.mark.parametrize("act", [nn.SiLU(), nn.PReLU(4)])
def test_kernels_before_other_activations(act: nn.Module, on_kernels: None) -> None:
    model = Pair(nn.BatchNorm2d(4, track_running_stats=False), act)
    fused = fuse(model, training=True)
    x = torch.randn(2, 4, 5, 5)
    got, want = train_step(fused, x), train_step(model, x)
    assert relative(got, want.double()) < 1e-5
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)  # type: ignore[arg-type]


def test_kernels_refuse_second_derivatives(on_kernels: None) -> None:
    fused = fuse(Pair(nn.BatchNorm2d(4)), training=True)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_kernels_leave_errors_to_torch(on_kernels: None) -> None:
    model = Pair(nn.BatchNorm2d(4))
    fused = fuse(model, training=True)
    for x in (torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5).double(), torch.randn(1, 4, 1, 1)):
        errors = []
        for one in (model, fused):
            with pytest.raises((RuntimeError, ValueError)) as error:
                one(x)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
