"""The stand-in for Triton's driver: it launches nothing, but all that leads to a launch is Triton's
own. Kernels are compiled in subprocesses, which do not interpret them."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from resfuse.kernels.gpu.common import c_launchers
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.common.stand_in_driver import stand_in
from resfuse.kernels.gpu.registry import KERNELS
from without_interpreter import printed_by

# One C launcher a signature of a kernel up to 3.6; the drivers since then have one for all.
HAS_LAUNCHERS = hasattr(c_launchers.nvidia, "make_launcher")


def first_launch(kernel: str) -> Launch:
    return next(launch for _, launch in KERNELS[kernel].launches())


def seen_with(**of_gpu: Any) -> dict[str, Any]:
    """What a stand-in saw of bn_act's launch, twice."""
    launch = first_launch("bn_act")
    with stand_in(**of_gpu) as driver:
        try:
            launch.run()
            launch.run()
            error = ""
        except Exception as raised:
            error = type(raised).__name__
    return {
        "launches": driver.launches,
        "compiled": driver.compiled,
        "found": driver.found,
        "launchers": [len(driver.launchers), len(driver.launchers_missing)],
        "grids": [list(one.grid) for one in driver.launched],
        "arguments": [sorted(one.args) for one in driver.launched],
        "error": error,
    }


def look_thrice() -> None:
    """Prints what three stand-ins saw, the last one after the launchers have been built, and what
    a stand-in left behind."""
    told = [seen_with(), seen_with(keeps_launches=False)]
    launch = first_launch("bn_act")
    with stand_in() as driver:
        launch.run()
    for source in driver.launchers:
        assert c_launchers.build_ahead(source) and not c_launchers.build_ahead(source)
    told.append(seen_with())
    with stand_in(arch=80) as driver:
        launch.run()
    gc.collect()
    left = [triton.runtime.driver._active, triton.knobs.compilation.listener]
    left.append(sum(kind == driver.device for kind in launch.kernel.device_caches) or None)
    print(json.dumps([*told, {"for sm_80": driver.compiled, "left": left}]))


def test_all_but_the_launch_is_tritons_own(tmp_path: Path) -> None:
    first, again, built, other = json.loads(
        printed_by("test_stand_in_driver", "look_thrice", tmp_path)
    )
    launch = first_launch("bn_act")
    names = sorted(p.name for p in launch.kernel.params) if hasattr(launch.kernel, "params") else []
    assert first["launches"] == 2 and first["compiled"] == ["bn_act_kernel"]
    assert first["found"] == [] and first["error"] == ""
    assert first["grids"] == [[*launch.grid, 1, 1][:3]] * 2
    assert set(first["arguments"][0]) == {*launch.args, *launch.constants} >= set(names)
    launchers = int(HAS_LAUNCHERS)
    assert first["launchers"] == [launchers, launchers]
    assert again["compiled"] == [] and again["found"] == ["bn_act_kernel"]
    assert again["launches"] == 2 and again["grids"] == []  # counted, not kept
    assert built["launchers"] == [launchers, 0]
    assert other == {"for sm_80": ["bn_act_kernel"], "left": [None, None, None]}


def print_small() -> None:
    print(json.dumps(seen_with(shared_bytes=-1)))


def test_a_gpu_without_room_refuses_as_the_real_one_does(tmp_path: Path) -> None:
    seen = json.loads(printed_by("test_stand_in_driver", "print_small", tmp_path))
    assert (seen["error"], seen["launches"]) == ("OutOfResources", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_an_interpreting_process_is_told_so() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), stand_in():
        pass


CUDA_FUNCTIONS = (
    "cuGetErrorString", "cuPointerGetAttribute", "cuCtxGetCurrent", "cuCtxSetCurrent",
    "cuDevicePrimaryCtxRetain", "cuDeviceGet", "cuFuncSetAttribute", "cuLaunchKernelEx",
)  # fmt: skip


def launch_by_tritons_own_launcher() -> None:
    """Prints how often Triton's own CudaLauncher has a C launcher compiled that was built ahead,
    and how often its C code then launched, both on a libcuda that only counts."""
    import ctypes
    import subprocess
    import tempfile

    from triton.backends.nvidia.driver import CudaLauncher

    with stand_in() as driver:
        launch = first_launch("bn_act")
        compiled = launch.kernel[launch.grid](
            **launch.args, **launch.constants, num_warps=launch.num_warps
        )
    (source,) = driver.launchers
    c_launchers.build_ahead(source)
    folder = tempfile.mkdtemp()
    body = "int launches;" + "".join(
        f"int {name}() {{ {'launches++;' if name == 'cuLaunchKernelEx' else ''} return 0; }}\n"
        for name in CUDA_FUNCTIONS
    )
    library = f"{folder}/libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", library],
        input=body, text=True, check=True,
    )  # fmt: skip
    cuda = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    built = []

    def refuse(*given: Any) -> str:
        built.append(given[0])
        raise RuntimeError("compiled again")

    triton.knobs.build.impl = refuse
    triton.knobs.nvidia.libcuda_path = folder
    run = CudaLauncher(compiled.src, compiled.metadata)
    args = [0 if isinstance(a, torch.Tensor) else a for a in driver.launched[0].args.values()]
    for _ in range(3):
        run(1, 1, 1, 0, 2, compiled.packed_metadata, None, None, None, *args)
    print(len(built), ctypes.c_int.in_dll(cuda, "launches").value)


@pytest.mark.skipif(not HAS_LAUNCHERS, reason="this Triton has one launcher for all kernels")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_triton_finds_and_runs_the_launcher_that_was_built_ahead(tmp_path: Path) -> None:
    told = printed_by("test_stand_in_driver", "launch_by_tritons_own_launcher", tmp_path)
    assert told.split() == ["0", "3"]
