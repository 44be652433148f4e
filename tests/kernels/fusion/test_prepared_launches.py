"""Launches of fused layers that are run again without choosing and describing them anew: under a
stand-in driver, in a process of its own, they are the launches they would have been.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from prepared_layers import CASES, Layer, step_of, tensors
from resfuse.kernels.fusion.layers import (
    compound_layers,
    fused_layers,
    norm_step,
    prepared_launch,
)
from resfuse.kernels.gpu.common import launch
from resfuse.kernels.gpu.common.stand_in_driver import Launched, StandInDriver, stand_in
from without_interpreter import printed_by

pytestmark = pytest.mark.slow


# These run in a process of their own


@contextmanager
def a_gpu() -> Iterator[StandInDriver]:
    """A driver for it, and tensors that say that they are on it."""
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    torch.Tensor.is_cpu = property(lambda self: False)  # type: ignore[assignment]
    with stand_in() as driver:
        yield driver


def told(driver: StandInDriver, step: Any, inputs: list[Tensor]) -> tuple[dict[str, Any], Launched]:
    """The one launch of a call, the tensors of which are named; and it as it was."""
    before = len(driver.launched)
    y = step(*inputs)
    (made,) = driver.launched[before:]
    names = {y.data_ptr(): "y"}
    names |= {x.data_ptr(): f"input {at}" for at, x in enumerate(inputs)}
    args = {name: called(value, names) for name, value in made.args.items()}
    return made._replace(args=args)._asdict(), made


def called(value: Any, names: dict[int, str]) -> Any:
    """An argument, tensors by name; scratch memory by its size."""
    if isinstance(value, TensorDescriptor):
        rest = {k: v for k, v in vars(value).items() if k != "base"}
        return {**rest, "base": called(value.base, names)}
    if isinstance(value, Tensor):
        address = value.data_ptr()
        return names.get(address, f"scratch of {value.numel()} {value.dtype}")
    return value


@contextmanager
def as_an_op() -> Iterator[None]:
    """Within it fused layers take every call for one that a tool looks at."""
    with pytest.MonkeyPatch.context() as patch:
        for layers in (fused_layers, norm_step, compound_layers):
            patch.setattr(layers, "is_unseen", lambda *_: False)
        yield


def count_runs() -> list[None]:
    """Grows with every launch that is described anew."""
    runs: list[None] = []
    run = launch.Launch.run

    def counted(self: launch.Launch) -> Any:
        runs.append(None)
        return run(self)

    launch.Launch.run = counted  # type: ignore[method-assign]
    return runs


def require_the_same_launches() -> None:
    """For the subprocess."""
    with torch.no_grad(), a_gpu() as driver:
        compare_launches(driver)
    print("the same")


def compare_launches(driver: StandInDriver) -> None:
    runs = count_runs()
    settings = [(torch.float16, 0), (torch.float16, 1), (torch.bfloat16, 0), (torch.float32, 0)]
    for name, (make, shapes, kernel) in CASES.items():
        for dtype, at in settings if name in ("1x1 + residual", "split-K") else settings[:2]:
            fused, step = step_of(make().to(dtype))
            first, second = (tensors(shapes, dtype, at) for _ in range(2))
            with as_an_op():
                want, plain = told(driver, step, second)
            assert plain.kernel == kernel, (name, plain.kernel)
            told(driver, step, first)
            described = len(runs)
            got, again = told(driver, step, second)
            assert len(runs) == described, name  # it was prepared
            assert got == want, (name, dtype, at)
            require_it_follows(name, driver, fused, step, shapes, dtype, (again, second))


def require_it_follows(
    name: str, driver: StandInDriver, fused: nn.Module, step: Any,
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, last: tuple[Any, list[Tensor]],
) -> None:  # fmt: skip
    """Other images, other addresses, other weights: each as it would have been launched."""
    more = tuple((3, *shape[1:]) for shape in shapes)
    for inputs in (tensors(more, dtype), tensors(shapes, dtype, 1), tensors(shapes, dtype, 8)):
        with as_an_op():
            want, _ = told(driver, step, inputs)
        assert [told(driver, step, inputs)[0] for _ in range(2)] == [want] * 2, name
    again, inputs = last
    if isinstance(step, norm_step.NormStep):
        return
    names = ("weight_ptr", "w_ptr", "bias_ptr")
    kept = {n: again.args[n] for n in names if n in again.args}
    fused.get_submodule("bn").bias.add_(1)  # type: ignore[operator]
    conv = step if isinstance(step, fused_layers.ConvStep) else step.conv
    conv.forget_if_stale()
    now = told(driver, step, inputs)[1]
    assert now.function == again.function
    for n, value in kept.items():
        before, after = (getattr(v, "base", v) for v in (value, now.args[n]))
        assert before.data_ptr() != after.data_ptr(), (name, n)


def require_the_right_place() -> None:
    """For the subprocess: devices, streams, graphs, hooks, and what is kept alive."""
    with torch.no_grad(), a_gpu() as driver:
        look_at_places(driver)
        require_one_kernel_for_all_batches(driver)
    print("right")


def look_at_places(driver: StandInDriver) -> None:
    make, shapes, _ = CASES["split-K"]
    _, step = step_of(make().half())
    x = tensors(shapes, torch.float16)
    told(driver, step, x)
    on_devices: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        on_devices.append(device)
        before, driver.device = driver.device, own
        yield
        driver.device = before

    own = driver.device
    prepared_launch.on, driver.device = on, own + 1  # type: ignore[assignment]
    assert told(driver, step, x)[1].device == own and len(on_devices) == 1
    driver.device = own
    assert told(driver, step, x)[1].device == own and len(on_devices) == 1

    counters: dict[int, set[int]] = {}
    for stream in (5, 6, 5, 6):
        driver.stream = stream
        made = told(driver, step, x)[1]
        assert made.stream == stream
        counters.setdefault(stream, set()).add(made.args["counters_ptr"].data_ptr())
        assert not made.args["counters_ptr"].any()
    assert len(counters[5]) == len(counters[6]) == 1 and not counters[5] & counters[6]
    (entry,) = step.fold.made.launches.values()
    entry._device = CapturedDevice()
    torch.cuda.is_current_stream_capturing = lambda: True
    captured = [told(driver, step, x)[1].args["counters_ptr"] for _ in range(3)]
    assert len({t.data_ptr() for t in captured} | counters[5] | counters[6]) == 5
    assert not any(t.any() for t in captured)

    seen: list[Any] = []
    hook = seen.append
    _, step = step_of(Layer(64, 64, 1).half())
    x = tensors(((1, 64, 8, 8),), torch.float16)
    want = [told(driver, step, x)[0] for _ in range(2)][1]
    triton.knobs.runtime.launch_enter_hook.add(hook)
    assert told(driver, step, x)[0] == want and [s.get()["name"] for s in seen] == [want["kernel"]]
    triton.knobs.runtime.launch_enter_hook.remove(hook)

    held = [weakref.ref(x[0]), weakref.ref(step(*x))]
    driver.launched.clear()
    del x
    gc.collect()
    assert [ref() for ref in held] == [None, None]


class CapturedDevice(str):
    """The CPU, by the name of a GPU."""

    type = "cuda"

    def __new__(cls) -> "CapturedDevice":
        return super().__new__(cls, "cpu")


def require_one_kernel_for_all_batches(driver: StandInDriver) -> None:
    """Tiles of pixels are a multiple of 16, or one, or neither."""
    from resfuse.kernels.gpu.block_tail import block_tail
    from resfuse.kernels.gpu.block_tail.block_tail_config import Config as TailConfig
    from resfuse.kernels.gpu.block_tail.block_tail_kernel import launch as launch_tail
    from resfuse.kernels.gpu.conv import conv
    from resfuse.kernels.gpu.conv.conv_arguments import Tensors
    from resfuse.kernels.gpu.conv.conv_config import Config
    from resfuse.kernels.gpu.split_k import split_k, split_k_config
    from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry

    tile = Config(64, 64, 64, num_stages=2)
    before = len(driver.folders)
    for n in (1, 3, 16):
        problem = ConvProblem(n, 64, 8, 8, 64, 3, 3, Geometry(padding=(1, 1)))
        x, y = tensors(((n, 64, 8, 8),) * 2, torch.float16)
        weight = torch.randn(64, 64, 3, 3).half().contiguous(memory_format=torch.channels_last)
        given = Tensors(x, weight, None, None, None, y)
        conv.launch(problem, given, tile).run()
        split = split_k_config.Config(tile, 3, 1)
        split_k.launch(problem, given, split, split_k.workspace(problem, split, "cpu")).run()
        kept = TailConfig(64, 64, 64, 4, 1, kept=3)
        one = torch.randn(64, 64, 1, 1).half().contiguous(memory_format=torch.channels_last)
        bias = torch.randn(64).half()
        tail = block_tail.problem_of(x, one, None, 1)
        launch_tail(tail, kept, x, weight, bias, one, bias, x, y).run()
    assert len(driver.folders) == before + 3
    assert sorted(driver.compiled[-3:]) == ["conv_kernel", "resident_kernel", "split_k_kernel"]


@pytest.mark.parametrize("check", ["require_the_same_launches", "require_the_right_place"])
def test_under_a_stand_in_driver(check: str, tmp_path: Path) -> None:
    told = printed_by("test_prepared_launches", check, tmp_path, RESFUSE_CACHE_DIR=str(tmp_path))
    assert told.split()[-1] in ("same", "right")
