"""A saved engine is a file from a stranger: changed 200 times, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine_models import SHAPE, images, made, small
from resfuse.kernels import build_engine
from scope import Scope

pytestmark = pytest.mark.slow

CHANGES, AT_ONCE = 200, 100
FUZZER = Path(__file__).parents[3] / "helpers/engine_fuzz.py"
OUTCOMES = ("refused", "answers as torch does", "torch refuses when it runs")


def chunked() -> nn.Module:
    """A residual block and a pool, in chunks where that pays, and bilinear sampling."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.norm(s.first(x)).relu()
        x = F.max_pool2d((s.second(x) + x).relu(), 2)
        return s.head(F.interpolate(s.wide(x).relu(), scale_factor=2, mode="bilinear").mean((2, 3)))

    return Scope(
        forward, first=nn.Conv2d(3, 16, 3, padding=1, bias=False), norm=nn.BatchNorm2d(16),
        second=nn.Conv2d(16, 16, 3, padding=1), wide=nn.Conv2d(16, 32, 1), head=nn.Linear(32, 10),
    )  # fmt: skip


def tokens() -> nn.Module:
    """Every other operation of the graph's, attention, a table and results in containers."""

    def forward(s: Any, x: Tensor) -> Any:
        y = s.act(s.norm(s.c(x)))
        y = F.leaky_relu(s.pool(y * torch.sigmoid(s.gate(y.mean((2, 3), keepdim=True)))), 0.1)
        t = y.flatten(2).transpose(1, 2) + s.table(s.places)
        t = F.scaled_dot_product_attention(*s.three(s.layer_norm(t)).chunk(3, -1))
        m = t.transpose(1, 2).reshape(y.shape)
        return {"a": s.groups(s.up(m)), "b": (t.softmax(-1), torch.cat([m, y], 1)[:, :, ::2])}

    model = Scope(
        forward, c=nn.Conv2d(3, 16, 4, 4), norm=nn.BatchNorm2d(16), act=nn.PReLU(16),
        pool=nn.AvgPool2d(3, 2, 1), gate=nn.Conv2d(16, 16, 1), table=nn.Embedding(4, 16),
        layer_norm=nn.LayerNorm(16), three=nn.Linear(16, 48), up=nn.ConvTranspose2d(16, 8, 2, 2),
        groups=nn.GroupNorm(2, 8),
    )  # fmt: skip
    model.register_buffer("places", torch.arange(4))
    return model


@pytest.fixture(scope="module")
def sources(timings: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name, factory, x, options in (
        ("chunked", chunked, images(4, 3, 16, 16), {"batch_sizes": (2, 4), "other_batches": "pad"}),
        ("small", small, images(*SHAPE), {}),
        ("tokens", tokens, images(2, 3, 16, 16), {}),
    ):
        build_engine(made(factory), x, timings=timings, **options).save(folder / f"{name}.engine")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("first", range(0, CHANGES, AT_ONCE))
def test_no_change_of_a_file_reaches_memory_or_an_answer(sources: list[Path], first: int) -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZER), str(first), str(first + AT_ONCE), *map(str, sources)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-800:])  # negative: a signal
    assert len(lines) == AT_ONCE
    assert [line for line in lines if not line.endswith(OUTCOMES)] == []
    assert sum(line.endswith("refused") for line in lines) > AT_ONCE / 2


def test_the_fuzzer_leaves_a_file_that_is_whole_alone(sources: list[Path]) -> None:
    from engine_fuzz import outcome

    for source in sources:
        assert outcome(source, source, renewed=False) == "answers as torch does"
