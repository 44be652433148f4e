"""The vectorised sigmoid and SiLU against fp64, over floats of every size."""

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
