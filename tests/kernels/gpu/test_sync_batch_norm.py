"""Batch norm over processes: the kernels of two, interpreted, against fp64 over the whole batch."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from resfuse.kernels import explain, fuse
from resfuse.kernels.fusion.training.training_mode import operations_anywhere
from resfuse.kernels.fusion.training.training_plan_builder import make_training_plan
from resfuse.kernels.gpu.batch_norm.bn_add_relu import Norm, bn_add_relu

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parents[2] / "helpers"
# A process that others stop for minutes is slow and not lost.
LIMIT_S = 600
FORMS = ("nothing", "residual", "shortcut", "frozen shortcut", "frozen", "no relu", "conv1x1")
OPS = [f"{form} {split} fp32" for form in FORMS for split in ((4, 1), (0, 3))]
UNEQUAL = ((3, 1), (0, 3))
NETWORKS = (
    "basic (2, 2)", *(f"{name} {s}" for name in ("bottleneck", "varied") for s in UNEQUAL),
)  # fmt: skip
ALONE = ("plain norms stay apart", "a group of one")

two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two processes need a core each"
)

Errors = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def errors() -> Errors:
    """Of every case of sync_processes.py, by what was compared."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(HERE / "sync_processes.py")],
        capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row["errors"] for row in rows}


def require_below(limit: float, found: dict[str, float]) -> None:
    assert found, "nothing was compared"
    assert not {what: error for what, error in found.items() if not error < limit}


@two_cores
@pytest.mark.parametrize("case", [*OPS, "shortcut (2, 2) fp32", "compiled"])
def test_two_processes_are_one_batch(case: str, errors: Errors) -> None:
    """Answers, running statistics, gradients of x and of what is added as of the whole batch; those
    of the vectors are sums over a process's own images. Halves of equal size, unequal, empty."""
    require_below(2e-6, errors[case])


@two_cores
@pytest.mark.parametrize("form", FORMS)
def test_formulas_in_fp64(form: str, errors: Errors) -> None:
    require_below(1e-13, errors[f"{form} (2, 3) fp64"])


@two_cores
def test_would_be_found_out_apart(errors: Errors) -> None:
    """Without the other's half everything is far off: what shows that the tests above can fail."""
    found = errors["apart"]
    assert min(found.values()) > 0.01, found


@two_cores
@pytest.mark.parametrize("case", [*NETWORKS, *ALONE])
def test_blocks_train_as_fp64_does_on_the_whole_batch(case: str, errors: Errors) -> None:
    """After two steps and an evaluation; gradients of parameters are added up as DDP would."""
    # a bias's gradient is a sum of which most cancels: 1e-5 of it is left to its order
    require_below(3e-5, errors[case])
    assert math.isclose(errors[case]["1.num_batches_tracked"], 0)


@two_cores
def test_torchs_error_on_a_cpu_and_well_behaved_operators(errors: Errors) -> None:
    """Which the processes assert."""
    assert {"torch's error on a CPU", "well-behaved operators"} <= set(errors)


def test_without_processes_it_is_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    exact = copy.deepcopy(model).double()
    fused = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model), training=True)
    assert explain(fused).fused_in_training == ("0",)
    x = torch.randn(2, 3, 6, 6)
    with operations_anywhere():
        fused(x).square().mean().backward()
    exact(x.double()).square().mean().backward()
    for p, q in zip(fused.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]
    for p, q in zip(fused.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=1e-5, atol=1e-7)


def chains_of(block: nn.Module) -> str:
    plan = make_training_plan(block, lambda _: None)
    return ", ".join(step.chain for step in plan.steps.values())


@pytest.mark.parametrize("which", ["bn2", "downsample.1"])
def test_norms_over_other_processes_are_not_joined(which: str) -> None:
    """Joined, they have one count; and of an empty batch, one takes what the other cannot."""
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    block = resnet.Bottleneck(8, 4, 2, projection)
    joined, taken_in = "projection's norm inside", " + relu -> conv + bn"
    assert joined in chains_of(block) and taken_in in chains_of(block)
    owner, _, name = which.rpartition(".")
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(block.get_submodule(which))
    setattr(block.get_submodule(owner), name, norm)
    assert (joined in chains_of(block)) == (which == "bn2")
    assert (taken_in in chains_of(block)) == (which == "downsample.1")


def test_refuses_a_join_of_two_groups() -> None:
    x, norm = torch.randn(2, 4, 3, 3), Norm(None, None, group="0")
    message = "argument shortcut: its norm's group is None; accepted: '0', norm's"
    with pytest.raises(ValueError, match=message):
        bn_add_relu(x, norm, shortcut=(x, Norm(None, None)))
