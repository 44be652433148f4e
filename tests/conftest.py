"""Fixtures shared by the tests, and the machine's facts for pytest-benchmark."""

import contextlib
import ctypes
import functools
import gc
import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

if TYPE_CHECKING:
    from resfuse.bench.trainings import data


def _index_of_scalars_in_the_interpreter() -> None:
    """Lets Triton 3.6 interpret kernels under NumPy 2.5, as Triton 3.8 does by itself.

    Triton's scalars are arrays of one element there, which NumPy does not convert any more.
    """
    import triton  # not before: Triton looks at TRITON_INTERPRET when it is imported
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        interpreter._patch_lang_tensor = patched


def _patch_once_in_a_launch() -> None:
    """Triton's interpreter patches its language once for each launch, and not again for each call
    of a device function; and it looks numpy's types up: a fifth of the CPU seconds of a launch.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, look_up = interpreter._patch_lang, interpreter._get_np_dtype
    looked_up = functools.cache(look_up)
    patched: set[object] = set()  # since the launch began

    def patched_once(function: Any) -> Any:
        modules = language, language.core
        uses = {x for x in function.__globals__.values() if any(x is m for m in modules)}
        if patched and uses <= patched:
            return interpreter._LangPatchScope()  # which restores nothing
        scope, outermost = patch(function), not patched
        patched.update(uses)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    def numpy_type(kind: Any) -> Any:
        pointer = isinstance(kind.scalar, language.pointer_type)
        return look_up(kind) if pointer else looked_up(kind.scalar)  # blocks have no hash

    interpreter._patch_lang, interpreter._get_np_dtype = patched_once, numpy_type


# Kernels are compiled or interpreted as Triton finds this when it is imported: without a GPU the
# same tests run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_index_of_scalars_in_the_interpreter()
_patch_once_in_a_launch()

# Tests of the harness run beside others, so that the machine it would wait for never rests.
os.environ.setdefault("RESFUSE_QUIET_S", "0")
# And none asks how fast it is: 3.4 of the 16 CPU seconds of a small `resfuse bench`.
os.environ.setdefault("RESFUSE_SURVEY_ROUNDS", "3")

# Nor where in a forward an operation was traced: one in seven of a capture's CPU seconds, as a test
# is called by forty functions of pytest's. torch would keep it for its messages alone.
torch.fx.config.do_not_emit_stack_traces = True

# Nor how long an example takes beside other tests: 200 ms are hypothesis's own limit.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

CLOCK = "resfuse.kernels.engine.tuning.clock"
CEILINGS = "resfuse.kernels.engine.cost.ceilings"
ROOT = Path(__file__).resolve().parent.parent
LONGEST = (
    "project/test_docs.py", "gpu/test_inspect.py", "cpu/test_native_sanitizers.py",
    "models/test_onnx_file.py", "running/test_sweep.py", "running/test_cluster.py",
    "tools/test_gpu_plan.py", "gpu/test_engine_gpu_compile.py",
)  # fmt: skip
Resfuse = Callable[..., subprocess.CompletedProcess[str]]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n logical`: half as many processes again as there are cores, since a quarter of a
    test's time is spent waiting: for a subprocess to start or end, for a pause, for a disk.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return math.ceil(1.5 * (cores or 1))


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws from torch's own generator while it is imported is always the same."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a minute and more come first: one that a worker began last would be waited for."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: Python's collector need not walk through it again each
    time that a network is traced (13 % of test_fuse_zoo's CPU seconds).
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """And what fixtures draw, whichever test is the first to need them."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """And what a test draws, whichever fixtures were made for it."""
    torch.manual_seed(0)


GROWTH = 512 << 20  # bytes
_resident = 0  # bytes, after memory was last given back


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """A process that has grown by GROWTH gives back what it does not use.

    Networks in reference cycles (torch.fx makes some) are freed: Python counts objects, and not
    their hundred megabytes, to decide when to look for them. And glibc keeps what is freed: after
    four networks of test_fuse_zoo 1480 MB were resident, of which 650 were not in use.
    """
    global _resident
    yield
    now = psutil.Process().memory_info().rss
    if now > _resident + GROWTH:
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        _resident = psutil.Process().memory_info().rss


@pytest.fixture(scope="module", autouse=True)
def _no_networks_left() -> Iterator[None]:
    """What a file's fixtures have made is freed before the next file, if it is more than 64 MB: to
    look for it took 0.1 s a file, of 250 files in each of three processes.
    """
    before = psutil.Process().memory_info().rss
    yield
    if psutil.Process().memory_info().rss > before + (64 << 20):
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The engine's times are kept in a folder of this process. Its libraries, whose names are
    hashes of all that they are made from, stay in the checkout for the next run: each takes 12 to
    20 CPU seconds to compile, and there are half a dozen. For every test: one without would compile
    them once more, into the user's folder.
    """
    folder, libraries = tmp_path_factory.mktemp("cache"), ROOT / "build" / "native"
    libraries.mkdir(parents=True, exist_ok=True)
    (folder / "native").symlink_to(libraries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESFUSE_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_time_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are neighbours of each other; a second build is to find what the first one timed."""
    monkeypatch.setattr("resfuse.kernels.tuning_cache.timing_cache.NOISY_SPREAD", math.inf)


@pytest.fixture(scope="session", autouse=True)
def _sweeps_of_caches_are_small() -> Iterator[None]:
    """Before each timed run the tuner writes 16 MB, so that the run finds cold caches: four tenths
    of the CPU seconds of a small engine's build. No test looks at which candidate is quicker.
    For a stand-in of a GPU it would be 256 MB, which stay as long as the traceback of an error that
    is a test's parameter: test_engine_gpu_measure came to 5.9 GB.
    """
    stand_ins = [] if torch.cuda.is_available() else ["cuda"]
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("cpu", *stand_ins):
            patch.setitem(importlib.import_module(CLOCK)._SWEPT_BYTES, kind, 1 << 16)
        yield


@pytest.fixture(scope="session", autouse=True)
def _ceilings_are_small() -> Iterator[None]:
    """What `explain` measures of the machine takes 0.9 s an engine where it is to be right."""
    ceilings = importlib.import_module(CEILINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings._SIDE, "cpu", 64)
        patch.setitem(ceilings._BYTES, "cpu", 1 << 20)
        yield


@pytest.fixture(scope="session", autouse=True)
def _programs_are_decomposed_in_less_time() -> Iterator[None]:
    from torch.export import exported_program

    from quick_decompositions import listed_once, overridden_once

    quick = {
        "_collect_all_valid_cia_ops": listed_once,
        "_override_composite_implicit_decomp": overridden_once,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, made in quick.items():
            if (original := getattr(exported_program, name, None)) is not None:  # of this torch
                patch.setattr(exported_program, name, made(original))
        yield


@pytest.fixture(scope="module")
def kept_exports() -> Iterator[None]:
    """For files whose modules only ever change the values of their parameters."""
    from kept_exports import keeping_exports

    with keeping_exports():
        yield


@pytest.fixture(scope="module")
def timings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of the engine's times for all tests of a file."""
    return tmp_path_factory.mktemp("timings")


@pytest.fixture(scope="session")
def few() -> "data.Data":
    """192 of scikit-learn's digits to train on and 100 to test on."""
    from resfuse.bench.trainings import data

    every = data.load("digits")
    train = data.Split(every.train.images[:192], every.train.labels[:192])
    test = data.Split(every.test.images[:100], every.test.labels[:100])
    return replace(every, train=train, test=test)


@pytest.fixture(scope="module")
def one_export_a_network() -> Iterator[None]:
    """Backends of ONNX get one file for all builds of a network in a file of tests: torch takes 5
    to 15 CPU seconds to export one, and leaves its batch free.
    """
    from resfuse.bench.backends import onnx_export, onnxrt, openvino
    from resfuse.bench.models.weights_file import state_hash

    files: dict[object, Path] = {}
    with contextlib.ExitStack() as exports, pytest.MonkeyPatch.context() as patch:

        @contextlib.contextmanager
        def exported(model: nn.Module, example: Tensor) -> Iterator[Path]:
            of = (str(model), state_hash(model), example.shape[1:], example.dtype, example.device)
            if of not in files:
                files[of] = exports.enter_context(onnx_export.exported(model, example))
            yield files[of]

        for backend in (onnxrt, openvino):
            patch.setattr(backend, "exported", exported)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "onednn"])
def conv_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """What computes convolutions on this CPU: native steps, or oneDNN where there are none."""
    from resfuse.kernels.cpu import packed_conv
    from resfuse.kernels.cpu.library import why_unavailable
    from resfuse.kernels.cpu.onednn import PackedConv

    if request.param == "onednn":
        monkeypatch.setattr(packed_conv, "supports", lambda *layer: False)
        return PackedConv
    if (reason := why_unavailable()) is not None:
        pytest.skip(reason)
    return packed_conv.NativeConv


def insert_after(file: Path, line: str, added: str) -> None:
    """Adds one line behind the one that starts with `line`, as a contributor would."""
    lines = file.read_text().splitlines(keepends=True)
    at = next(i for i, text in enumerate(lines) if text.startswith(line))
    file.write_text("".join([*lines[: at + 1], added + "\n", *lines[at + 1 :]]))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources under their import name, for tests that plant something in them."""
    home = tmp_path_factory.mktemp("checkout")
    for package in ("bench", "kernels", "resnet_ref", "tools"):
        source, target = ROOT / package, home / "resfuse" / package
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    return home


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A `python` that has torch loaded; the usual one where a fork of it cannot be."""
    folder = tmp_path_factory.mktemp("forks")
    # No fork can use a GPU, and no address of a server is longer.
    if sys.platform != "linux" or torch.cuda.is_available() or len(str(folder)) > 90:
        yield sys.executable
        return
    import forked_python
    from resfuse.bench.measuring.probes import allocator

    with forked_python.serving(folder, allocator.keeping(os.environ)) as program:
        yield str(program)


@pytest.fixture
def forked_workers(forked_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are measured in forks of a process that has torch loaded, in tests of what is measured;
    those of how processes begin and end start their own.
    """
    runner = "resfuse.bench.running.subprocess_runner.sys"
    monkeypatch.setattr(runner, SimpleNamespace(executable=forked_python))


@pytest.fixture(scope="session")
def resfuse_in() -> Callable[..., Resfuse]:
    """`resfuse_in(checkout)(*arguments)` runs the command from a copy of the sources."""

    def bind(checkout: Path, python: str = sys.executable) -> Resfuse:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"}

        def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
            command = [python, "-m", "resfuse.bench", *map(str, arguments)]
            return subprocess.run(
                command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300
            )

        return run

    return bind


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """CPU or GPU facts beside pytest-benchmark's own, so that a saved run says where it ran."""
    from resfuse.bench.measuring.probes import machine

    facts = machine.facts("cuda" if torch.cuda.is_available() else "cpu", 0)
    machine_info["resfuse"] = {**facts, "env_id": machine.env_id(facts)}


@pytest.fixture(params=[1, 2, 3])
def thread_counts(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, two, and more than there are cores here."""
    from resfuse.kernels.cpu.cpus import asking

    with asking(request.param):
        yield request.param
