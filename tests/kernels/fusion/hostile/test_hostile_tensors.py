"""Every kind of tensor, thrown at fused models and at native steps: eager's answer, or a Python
exception, and never a signal. In a process of its own, since memory may be overwritten.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

from resfuse.kernels import fuse
from resfuse.kernels.cpu.library import why_unavailable
from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.ops.conv_problem import Geometry

pytestmark = pytest.mark.slow

SHAPE = (2, 16, 8, 8)


class Image(torch.Tensor):
    """As fastai's."""


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        made = func(*args, **kwargs)
        return torch.utils._pytree.tree_map(
            lambda value: Wrapper(value) if isinstance(value, Tensor) else value, made
        )


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.randn(SHAPE)


def _leaked() -> Tensor:
    """A tensor that vmap has wrapped, outside of it."""
    kept: list[Tensor] = []
    vmap(lambda x: kept.append(x) or x)(torch.randn(3, *SHAPE))
    return kept[0]


def _resized() -> Tensor:
    x = torch.randn(SHAPE)
    return x[:0].view(0, 16, 8, 8)


def _nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(16, 8, 8), torch.randn(16, 6, 8)])


def _jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(16, 8), torch.randn(3, 8)], layout=torch.jagged)


def _complex_part(part: str) -> Tensor:
    x = torch.randn(2, 8, 8, 16, dtype=torch.complex64).permute(0, 3, 1, 2)
    return getattr(x.conj(), part)


def _mkldnn() -> Tensor:
    return torch.randn(SHAPE).to_mkldnn()


KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: torch.randn(SHAPE),
    "parameter": lambda: nn.Parameter(torch.randn(SHAPE), requires_grad=False),
    "gradients": lambda: torch.randn(SHAPE, requires_grad=True),
    "subclass": lambda: torch.randn(SHAPE).as_subclass(Image),
    "wrapper": lambda: Wrapper(torch.randn(SHAPE)),
    "fake": _fake,
    "of vmap": _leaked,
    "meta": lambda: torch.randn(SHAPE, device="meta"),
    "sparse": lambda: torch.randn(SHAPE).to_sparse(),
    "sparse csr": lambda: torch.randn(16, 8).to_sparse_csr(),
    "mkldnn": _mkldnn,
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(SHAPE), 0.1, 0, torch.quint8),
    "nested": _nested,
    "jagged": _jagged,
    "negated": lambda: _complex_part("imag"),
    "real part": lambda: _complex_part("real"),
    "complex": lambda: torch.randn(SHAPE, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(SHAPE, dtype=torch.complex64).conj(),
    "half": lambda: torch.randn(SHAPE).half(),
    "bfloat16": lambda: torch.randn(SHAPE).bfloat16(),
    "double": lambda: torch.randn(SHAPE).double(),
    "integers": lambda: torch.ones(SHAPE, dtype=torch.int64),
    "bytes": lambda: torch.ones(SHAPE, dtype=torch.uint8),
    "booleans": lambda: torch.ones(SHAPE, dtype=torch.bool),
    "float8": lambda: torch.randn(SHAPE).to(torch.float8_e4m3fn),
    "empty batch": _resized,
    "no pixels": lambda: torch.randn(2, 16, 0, 8),
    "no channels": lambda: torch.randn(2, 0, 8, 8),
    "other channels": lambda: torch.randn(2, 15, 8, 8),
    "unbatched": lambda: torch.randn(16, 8, 8),
    "five dimensions": lambda: torch.randn(2, 16, 8, 8, 2),
    "no dimensions": lambda: torch.randn(()),
    "smaller than the window": lambda: torch.randn(2, 16, 1, 1),
    "expanded": lambda: torch.randn(1, 1, 1, 1).expand(SHAPE),
    "overlapping": lambda: torch.randn(400).as_strided(SHAPE, (3, 2, 9, 1)),
    "inference": torch.inference_mode()(lambda: torch.randn(SHAPE)),
    "in shared memory": lambda: torch.randn(SHAPE).share_memory_(),
    "of numpy, backwards": lambda: torch.randn(SHAPE).numpy()[:, ::-1],
    "a list": lambda: [torch.randn(SHAPE)],
    "none": lambda: None,
    "a number": lambda: 3.0,
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.na, self.nb = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.na(self.a(x)).relu()
        return (self.nb(self.b(y)) + y).relu()


def answer(call: Callable[[Any], Any], x: Any) -> Any:
    """What comes back, or which exception."""
    try:
        with torch.no_grad():
            return call(x)
    except Exception as error:
        return error


def same(got: Any, wanted: Any) -> bool:
    """As eager's: the type, where it lies, and the values where there are some. Where eager raises,
    any exception will do."""
    if isinstance(wanted, Exception) or isinstance(got, Exception):
        return isinstance(got, Exception) and isinstance(wanted, Exception)
    if type(got) is not type(wanted) or got.dtype != wanted.dtype or got.device != wanted.device:
        return False
    if got.is_meta or type(got).__name__ == "FakeTensor":
        return got.shape == wanted.shape and got.stride() == wanted.stride()
    if isinstance(got, Wrapper):
        got, wanted = got.inner, wanted.inner
    if torch._C._functorch.is_functorch_wrapped_tensor(got):
        return True
    if got.layout is torch._mkldnn:  # type: ignore[attr-defined]
        got, wanted = got.to_dense(), wanted.to_dense()
    if got.is_nested:
        return all(map(torch.allclose, got.unbind(), wanted.unbind()))
    return got.shape == wanted.shape and torch.allclose(
        got.double(), wanted.double(), rtol=1e-3, atol=0.1 if got.dtype.itemsize < 4 else 1e-4
    )


def models() -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(0)
    yield "small", Small().eval()
    yield "sequence", nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.SiLU()).eval()
    yield "no norm", nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU()).eval()


def throw_at_models(kind: str) -> None:
    torch.manual_seed(1)
    x = KINDS[kind]()
    for name, plain in models():
        fused = fuse(plain)
        for _ in range(2):
            wanted, got = answer(plain, x), answer(fused, x)
            assert same(got, wanted), (kind, name, got, wanted)
            y = torch.randn(SHAPE)  # and it is as good as new
            assert same(answer(fused, y), answer(plain, y)), (kind, name)


def throw_at_steps(kind: str) -> None:
    """At the native convolution: what it does not refuse, it computes."""
    torch.manual_seed(1)
    weight, bias = torch.randn(16, 16, 3, 3), torch.randn(16)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    conv = NativeConv(weight, bias, geometry, "relu", None)

    def layers(x: Any) -> Any:
        return torch.relu(torch.conv2d(x, weight, bias, padding=1))

    x, y = KINDS[kind](), torch.randn(SHAPE)
    got = answer(conv, x)
    assert isinstance(got, ValueError | RuntimeError) or same(got, answer(layers, x)), (kind, got)
    for residual, overwrite in ((x, False), (x, True)):
        if isinstance(residual, Tensor) and overwrite:
            residual = KINDS[kind]()
        got = answer(lambda z, r=residual, o=overwrite: conv.add(z, r, o), y)
        if not isinstance(got, Exception):
            assert got.shape == y.shape and got.isfinite().all()
    assert same(answer(conv, y), answer(layers, y))


DEFAULTS = {
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "meta": lambda: torch.set_default_device("meta"),
}


def throw_defaults(name: str) -> None:
    """The process's defaults are not a model's: set before it is fused, and after it has run."""
    x = torch.randn(SHAPE)
    for _, plain in models():
        late = fuse(plain)
        wanted, _ = answer(plain, x), answer(late, x)
        DEFAULTS[name]()
        for fused in (late, fuse(plain)):
            for _ in range(4):
                got = answer(fused, x)
                assert isinstance(got, Tensor), got
                assert got.dtype == torch.float32 and got.device.type == "cpu"
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")


THROWS = {"models": throw_at_models, "steps": throw_at_steps, "defaults": throw_defaults}


@pytest.mark.parametrize("what", THROWS)
def test_no_tensor_ends_the_process(what: str) -> None:
    if what == "steps" and (why := why_unavailable()):
        pytest.skip(why)
    names = DEFAULTS if what == "defaults" else KINDS
    failed = {}
    left = list(names)
    while left:  # a signal ends the process: the next one goes on after it
        done = subprocess.run(
            [sys.executable, __file__, what, *left], capture_output=True, text=True, timeout=500
        )
        said = [line.split(" ", 1) for line in done.stdout.splitlines() if line[:2] in ("P:", "F:")]
        for verdict, name in said:
            if verdict == "F:":
                failed[name] = done.stdout[-500:]
        if done.returncode == 0:
            break
        culprit = left[len(said)]
        failed[culprit] = f"return code {done.returncode}: {done.stderr[-300:]}"
        left = left[len(said) + 1 :]
    assert not failed


def test_a_fused_model_of_subclassed_weights_runs_its_layers() -> None:
    plain = Small().eval()
    fused = fuse(plain)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        fused(x)
        for model in (plain, fused):
            model.a.weight = nn.Parameter(model.a.weight.data.as_subclass(Image) * 2)
        torch.testing.assert_close(fused(x), plain(x))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3] / f) for f in ("helpers", "helpers/networks")]
    torch.set_num_threads(1)
    for thrown in sys.argv[2:]:
        try:
            THROWS[sys.argv[1]](thrown)
            print("P:", thrown, flush=True)
        except AssertionError as error:
            print("F:", thrown, flush=True)
            print(" ", str(error)[:300].replace("\n", " "), flush=True)
