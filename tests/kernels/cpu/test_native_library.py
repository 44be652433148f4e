"""The compiled library of the native steps: every compiler's, and what happens without one."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graphs import error, pool_graph
from native_problems import FORMS, PROBLEMS, config_of, require_conv
from resfuse.kernels import build_engine
from resfuse.kernels.cpu import program as step
from resfuse.kernels.cpu.library import (
    NativeUnavailable,
    cache_folder,
    fingerprint,
    library,
    require_layout,
    why_unavailable,
)
from resfuse.kernels.cpu.program import ACTIVATIONS, Program, Step
from resfuse.kernels.engine.ir.graph import MaxPool
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics.cpu import native

pytestmark = pytest.mark.slow


@pytest.fixture
def not_yet_loaded() -> Iterator[None]:
    """As in a new process."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def failing_compiler(tmp_path: Path) -> Path:
    script = tmp_path / "failing-c++"
    script.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    script.chmod(0o755)
    return script


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def require_engine_without_native(timings: Path) -> None:
    model, x = small_network(), torch.randn(2, 3, 12, 11)
    engine = build_engine(model, x, timings=timings)
    said = engine.explain()
    assert "onednn" in said and "native" not in said
    with torch.no_grad():
        assert error(engine(x), model(x)) < 1e-6


@pytest.mark.usefixtures("not_yet_loaded")
def test_without_a_compiler_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(NativeUnavailable, match="/nonexistent/c\\+\\+"):
        library()
    assert fingerprint() == "none"
    require_engine_without_native(tmp_path)


@pytest.mark.usefixtures("not_yet_loaded")
def test_with_a_failing_compiler_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_compiler: Path
) -> None:
    monkeypatch.setenv("CXX", str(failing_compiler))
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path / "cache"))
    assert "out of luck" in str(why_unavailable())
    require_engine_without_native(tmp_path)
    assert not list((tmp_path / "cache" / "native").iterdir())


@pytest.mark.usefixtures("not_yet_loaded")
def test_of_what_a_failing_compiler_said_the_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clang without libomp's header says it."""
    script = tmp_path / "c++"
    lines = ["steps.cpp:2:10: fatal error: 'omp.h' file not found", "#include <omp.h>", "1 error."]
    script.write_text(
        "".join(["#!/bin/sh\n", *(f'echo "{line}" >&2\n' for line in lines), "exit 1"])
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path / "cache"))
    assert str(why_unavailable()).endswith("fatal error: 'omp.h' file not found")


@pytest.fixture(params=["g++", "clang++"])
def compiler(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, not_yet_loaded: None
) -> str:
    """The library is that compiler's, where there is one that knows OpenMP."""
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param} here")
    monkeypatch.setenv("CXX", request.param)
    reason = why_unavailable()
    if reason is not None and "omp" in reason:
        pytest.skip(f"{request.param} has no OpenMP here: {reason}")
    assert reason is None
    return request.param


@pytest.mark.parametrize("name", [*FORMS, "groups of 2", "groups of 8", "depthwise"])
def test_every_compiler_makes_a_right_library(compiler: str, name: str) -> None:
    """In all lanes: clang has no shuffle by lanes in a variable, and is given another."""
    form, problem = FORMS.get(name) or ("grouped", PROBLEMS[name])
    for activation in ACTIVATIONS:
        require_conv(
            replace(problem, n=2, epilogue=problem.epilogue._replace(activation=activation)),
            config_of(form, problem),
        )


def test_every_compiler_keeps_nan_in_pools(compiler: str) -> None:
    x = torch.randn(1, 32, 7, 9, generator=torch.Generator().manual_seed(0))
    x[0, 5, 3, 4] = float("nan")
    graph = pool_graph(MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), tuple(x.shape))
    (choice,) = native.segments(graph, 0)
    (y,) = Executor(graph, [choice], {})(x)
    assert torch.equal(y.isnan(), torch.max_pool2d(x, 3, 2, 1).isnan()) and y.isnan().any()


@pytest.mark.usefixtures("not_yet_loaded")
def test_with_a_compiler_that_is_no_program_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_bytes(b"\x7fELF and nothing else")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "broken-c++" in str(why_unavailable())
    assert fingerprint() == "none"
    require_engine_without_native(tmp_path)


@pytest.mark.usefixtures("not_yet_loaded")
def test_with_an_unwritable_cache_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path / "cache"))
    assert "cannot be made" in str(why_unavailable())
    require_engine_without_native(tmp_path)


@pytest.mark.usefixtures("not_yet_loaded")
def test_a_library_that_is_none_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path))
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / f"{fingerprint()}.so").write_bytes(b"no library")
    assert "cannot be loaded" in str(why_unavailable())


def test_processes_that_need_it_at_once_compile_it_once(tmp_path: Path) -> None:
    """The compiler is one that hands out the library at hand, half of it a second earlier."""
    lanes, at_hand = step.lanes(), cache_folder() / "native" / f"{fingerprint()}.so"
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nfor made; do :; done\n'
        f'echo >> "{tmp_path}/calls"\n'
        f'head -c 100000 "{at_hand}" > "$made" && sleep 3 && cp "{at_hand}" "$made"\n'
    )
    compiler.chmod(0o755)
    program = "from resfuse.kernels.cpu.program import lanes; print(lanes())"
    environment = {**os.environ, "RESFUSE_CACHE_DIR": str(tmp_path), "CXX": str(compiler)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said == [f"{lanes}\n"] * 2
    (only,) = (tmp_path / "native").iterdir()
    assert only.suffix == ".so"
    assert (tmp_path / "calls").read_text() == "\n"


@pytest.mark.parametrize("how", ["two swapped", "one missing", "one more"])
def test_a_struct_that_python_lays_out_otherwise_is_refused(how: str) -> None:
    """Sizes alone would let fields that changed places pass."""
    require_layout(Step, "Step")
    fields = list(Step._fields_)
    if how == "two swapped":
        fields[1:3] = fields[2], fields[1]
    elif how == "one missing":
        fields.pop()
    else:
        fields.append(("more", ctypes.c_long))
    other = type("Step", (ctypes.Structure,), {"_fields_": fields})
    with pytest.raises(NativeUnavailable, match="lays Step out otherwise"):
        require_layout(other, "Step")


def test_a_program_of_no_steps_returns() -> None:
    Program([], threads=2)()
