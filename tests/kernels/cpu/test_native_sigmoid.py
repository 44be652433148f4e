"""The vectorised sigmoid, SiLU and GELU against fp64, over floats of every size."""

import pytest
import torch

from graphs import affine_graph
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Affine
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.ops.activation import ACTIVATIONS

SHAPE = (1, 64, 128, 128)


def floats() -> torch.Tensor:
    """A million of them: half of any bits, half where the activations bend and saturate."""
    generator = torch.Generator().manual_seed(0)
    half = SHAPE[1] * SHAPE[2] * SHAPE[3] // 2
    bits = torch.randint(-(2**31), 2**31, (half,), generator=generator, dtype=torch.int64)
    dense = torch.linspace(-110, 110, half)
    return torch.cat([bits.to(torch.int32).view(torch.float32), dense]).reshape(SHAPE)


@pytest.mark.parametrize("name", ["sigmoid", "silu"])
def test_it_is_as_exact_as_it_says(name: str) -> None:
    x = floats()
    graph = affine_graph(Affine(None, name), SHAPE)
    (got,) = Executor(graph, [Candidate("native", 0, 1)], {})(x)
    want = ACTIVATIONS[name].forward(x.double(), None)
    torchs = ACTIVATIONS[name].forward(x, None)
    assert torch.equal(got.isnan(), torchs.isnan())  # silu(-inf), too
    assert torch.equal(got.isinf(), torchs.isinf())
    finite = torchs.isfinite()
    got, want, x = got[finite].double(), want[finite], x[finite].double()
    off = (got - want).abs()
    if name == "sigmoid":
        assert off.max() < 1.3e-7
        large = want > 1e-30
        assert (off / want)[large].max() < 3e-7
    else:
        assert (off / x.abs().clamp(min=1e-30)).max() < 1.3e-7
        assert (off / want.abs())[want.abs() > 1e-30].max() < 3e-7


@pytest.mark.parametrize(
    ("name", "of_argument", "of_result"),
    [("gelu", 2.5e-7, 1e-6), ("gelu_tanh", 2e-7, 3e-6)],
)
def test_gelu_is_as_exact_as_it_says(name: str, of_argument: float, of_result: float) -> None:
    """Of its result only above -5: torch's own is off by a third there, and fp64's digits end."""
    x = floats()
    x[0, :8] = torch.linspace(-6, 6, 8 * SHAPE[2] * SHAPE[3]).view(8, *SHAPE[2:])
    graph = affine_graph(Affine(None, name), SHAPE)
    (got,) = Executor(graph, [Candidate("native", 0, 1)], {})(x)
    want = ACTIVATIONS[name].forward(x.double(), None)
    torchs = ACTIVATIONS[name].forward(x, None)
    assert torch.equal(got.isnan(), torchs.isnan())  # gelu(-inf), too
    assert torch.equal(got.isinf(), want.float().isinf())  # torch overflows where AVX-512 is
    finite = torchs.isfinite()
    got, want, x = got[finite].double(), want[finite], x[finite].double()
    off = (got - want).abs()
    assert (off / x.abs().clamp(min=1e-30)).max() < of_argument
    near = (x > -5) & (x.abs() > 1e-30)
    assert (off / want.abs())[near].max() < of_result
