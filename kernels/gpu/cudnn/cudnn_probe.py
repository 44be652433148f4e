"""Which form of cuDNN's convolution + ReLU is right and fastest on the GPU at hand, and whether to
have torch search its plans.

Three shapes of ResNet-50 are asked, once an environment, which takes some seconds; the times are
kept in the cache of times, and the answer follows from them. Every way is measured in a thread of
its own, which has no plans yet: see cudnn_relu.py.
"""

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.gpu.common.graph_capture import Replay, record, warm_up
from resfuse.kernels.gpu.cudnn.cudnn_relu import (
    FORMS,
    Way,
    conv_relu,
    searching,
    zeros_for,
)
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

Key = tuple[str, str]  # of the timing cache
Result = TypeVar("Result")

# A 1x1, a 3x3 and a strided one of ResNet-50's, at a batch whose maps are more than a cache holds
# and whose fp64 twin fits small GPUs: 1 GB.
PROBED = (
    ConvProblem(64, 256, 56, 56, 64, 1, 1),
    ConvProblem(64, 128, 28, 28, 128, 3, 3, Geometry(padding=(1, 1))),
    ConvProblem(64, 128, 56, 56, 128, 3, 3, Geometry((2, 2), (1, 1))),
)
_IN_A_ROW, _ROUNDS = 10, 5
# A search builds all of cuDNN's plans for a convolution, whatever benchmark_limit says (that bounds
# how many are timed), in every process and thread, for ResNet-50 some 25 times a batch size. It is
# worth that where it wins this share of the time for at most so many ms a convolution.
_SEARCH_WINS, _SEARCH_MS = 0.02, 250.0


class Times(Protocol):
    """A TimingCache, or a dict."""

    def __contains__(self, key: Any, /) -> bool: ...
    def get(self, key: Key, /) -> float | None: ...


@dataclass(frozen=True)
class Tried:
    """One way on one shape. `first_ms` is the first call's, plans included, by the host's clock."""

    shape: str
    form: str
    search: bool
    right: bool
    error: float | None  # relative, in norm; None where it is no number
    ms: float | None
    first_ms: float | None
    why: str


# What is planned for where there is no GPU to ask; and what is used where asking fails: it is right
# whatever the plan reads.
ASSUMED = Way("channel_zeros", search=False)
UNDECIDED = Way("zeros", search=False)
_PLAIN = Way("plain", search=False)


def as_decided(device: torch.device, math_mode: str) -> contextlib.AbstractContextManager[None]:
    """`searching` as was decided for the device; on a CPU a context that changes nothing.

    For what runs the same convolutions first, in the same thread, and must not settle their plans.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return searching(decided(math_mode, device).search)


def decided(math_mode: str, device: torch.device | None = None) -> Way:
    """The way of a GPU, measured where the cache of times has none; ASSUMED where there is no GPU.

    Measuring takes a few seconds, once an environment.

    Args:
        math_mode: a name in problem.MATH_MODES.
        device: by default the current GPU.

    Raises:
        RuntimeError: a way has broken the GPU for this process; the next one leaves it out.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return ASSUMED
    index = None if device is None else device.index
    return _decided(torch.cuda.current_device() if index is None else index, math_mode)


@functools.cache
def _decided(index: int, math_mode: str) -> Way:
    device = torch.device("cuda", index)
    return _decide(device, math_mode, TimingCache(device))


def _decide(device: torch.device, math_mode: str, cache: TimingCache) -> Way:
    """From the cache where it has everything; measures the rest."""
    if choose(cache, math_mode) is None:
        try:
            _measure(device, math_mode, cache, anew=False)
        except Exception as failure:  # a probe that fails is not to cost a network
            _require_device(device, "probe", failure)
            warnings.warn(
                f"cuDNN's ways of convolution + ReLU could not be told apart: {_told(failure)}",
                stacklevel=4,
            )
    return choose(cache, math_mode) or UNDECIDED


def probe(
    device: torch.device, math_mode: str = "fp16", timings: Path | None = None
) -> dict[str, Any]:
    """Measures anew all ways that are not known as wrong, keeps their times for every later process
    and says what was found.

    Args:
        device: a CUDA device.
        math_mode: a name in problem.MATH_MODES.
        timings: the folder of the cache of times; by default the user's, which `decided` reads.

    Returns:
        what json.dumps takes: "tried", the fields of each Tried; "decision", those of the Way;
        "math_mode"; "cudnn", its version.

    Raises:
        RuntimeError: a way has broken the GPU for this process; the next one leaves it out. Or
            there is no room for the three shapes, about 1 GB; or not even torch's own convolution
            and ReLU came out right.
    """
    cache = TimingCache(device, timings)
    tried = _measure(device, math_mode, cache, anew=True)
    _decided.cache_clear()
    way = choose(cache, math_mode)
    assert way is not None
    return {
        "math_mode": math_mode,
        "cudnn": torch.backends.cudnn.version(),
        "tried": [asdict(one) for one in tried],
        "decision": asdict(way),
    }


def choose(times: Times, math_mode: str) -> Way | None:
    """The form that is right on all shapes and fastest over them, searched where that pays.

    Args:
        times: ms by `key_of`, None for what is wrong.
        math_mode: a name in problem.MATH_MODES.

    Returns:
        None where a time is missing.
    """
    form = _best_form(times, math_mode)
    if form is None:
        return None
    searched = Way(form, search=True)
    keys = [key_of(p, math_mode, searched, first) for p in PROBED for first in (False, True)]
    if any(key not in times for key in keys):
        return None
    with_search = _total(times, math_mode, searched)
    cost = _total(times, math_mode, searched, first=True)
    without = _total(times, math_mode, Way(form, search=False))
    if with_search is None or cost is None or without is None:
        return Way(form, search=False)
    wins = with_search <= (1 - _SEARCH_WINS) * without
    return Way(form, search=wins and cost <= _SEARCH_MS * len(PROBED))


def key_of(problem: ConvProblem, math_mode: str, way: Way, first: bool = False) -> Key:
    """Under which the timing cache has a way's time, or that of its first call."""
    part = f"conv + relu {problem.label()} pad {problem.padding} {math_mode}"
    return part, f"cudnn {way.label()}" + ", first call" * first


def _best_form(times: Times, math_mode: str) -> str | None:
    """None where a form has not been tried on a shape; `plain` where none is right on all."""
    ways = {form: Way(form, search=False) for form in FORMS}
    if any(key_of(p, math_mode, way) not in times for p in PROBED for way in ways.values()):
        return None
    totals = {form: _total(times, math_mode, way) for form, way in ways.items()}
    right = {form: ms for form, ms in totals.items() if ms is not None}
    return min(right, key=right.__getitem__, default="plain")


def _total(times: Times, math_mode: str, way: Way, first: bool = False) -> float | None:
    """ms over all shapes; None where one of them is wrong."""
    each = [times.get(key_of(problem, math_mode, way, first)) for problem in PROBED]
    known = [ms for ms in each if ms is not None]
    return sum(known) if len(known) == len(each) else None


def _measure(device: torch.device, math_mode: str, cache: TimingCache, anew: bool) -> list[Tried]:
    """Puts times of all forms into the cache, then those of the best one with a search.

    Args:
        device: a CUDA device.
        math_mode: a name in problem.MATH_MODES.
        cache: what is known to be wrong in it is not tried again.
        anew: whether the rest of what is known is.
    """
    tried: list[Tried] = []

    def try_all(way: Way) -> None:
        for layer in layers:
            if anew or key_of(layer.problem, math_mode, way) not in cache:
                tried.append(_try(layer, way, cache))

    with torch.cuda.device(device), _multiplying(math_mode):
        layers = [_Layer(problem, math_mode, device) for problem in PROBED]
        try_all(_PLAIN)  # which is right if the probe itself is
        if failed := [one for one in tried if not one.right]:
            raise RuntimeError(f"torch's own {failed[0].shape}: {failed[0].why}")
        for form in FORMS:
            if form != _PLAIN.form:
                try_all(Way(form, search=False))
        best = _best_form(cache, math_mode)
        assert best is not None
        try_all(Way(best, search=True))
    return tried


@contextlib.contextmanager
def _multiplying(math_mode: str) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = math_mode == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class _Layer:
    """A convolution with ReLU as in a network, its fp64 answer, and how far off one may be."""

    @torch.inference_mode()
    def __init__(self, problem: ConvProblem, math_mode: str, device: torch.device) -> None:
        self.problem, self.math_mode, self.device = problem, math_mode, device
        dtype, p = dtypes_of(math_mode).input, problem
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            made = scale * torch.randn(shape, generator=generator, device=device)
            memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            return made.to(dtype).contiguous(memory_format=memory_format)

        self.x = normal(p.n, p.c, p.h, p.w).relu_()
        self.weight = normal(p.k, p.c, p.r, p.s, scale=math.sqrt(2 / (p.c * p.r * p.s)))
        self.bias = normal(p.k, scale=0.1)
        self.geometry, self.y_shape = p.geometry, p.output_shape
        x, weight, bias = (t.double() for t in (self.x, self.weight, self.bias))
        self.exact = F.conv2d(x, weight, bias, *self.geometry).relu_()
        own = self.error(_in_new_thread(self.run("plain"), device))
        self.allowed = EAGER_FACTOR * own + TOLERANCES[math_mode].rtol

    def run(self, form: str) -> Callable[[], Tensor]:
        """A call of the form, which keeps what it reads."""

        def blank(count: int) -> Tensor:
            return torch.zeros(count, dtype=self.x.dtype, device=self.device)

        z = zeros_for(form, self.y_shape, blank)
        return lambda: conv_relu(form, self.x, self.weight, self.bias, z, self.geometry)

    def error(self, y: Tensor) -> float:
        """The relative error in norm."""
        return float((y.double() - self.exact).norm() / self.exact.norm())

    def fill_with_nan(self) -> None:
        """So that what is allocated next for an output holds NaN: of the memory that torch has at
        hand all that fits one does."""
        torch.cuda.empty_cache()
        nan = functools.partial(torch.full, self.y_shape, math.nan, device=self.device)
        blocks = [nan(dtype=self.x.dtype) for _ in range(3)]
        del blocks


def _try(layer: _Layer, way: Way, cache: TimingCache) -> Tried:
    """One way on one layer, in a thread of its own: one that has no plans yet.

    Raises:
        RuntimeError: it broke the GPU for this process.
    """
    keys = [key_of(layer.problem, layer.math_mode, way, first) for first in (False, True)]
    wrong = functools.partial(
        Tried, keys[0][0], way.form, way.search, False, error=None, ms=None, first_ms=None
    )
    if keys[0] in cache and cache.get(keys[0]) is None:
        return wrong(why="it was found wrong before")
    kept = keys if way != _PLAIN else []  # what goes wrong with that is the probe's own fault
    if kept:
        cache.put(keys[0], None, "it was tried, and the process did not live to tell")
    try:
        error, first_ms, ms = _in_new_thread(lambda: _error_and_times(layer, way), layer.device)
    except torch.OutOfMemoryError as failure:  # another day there may be room
        cache.forget(keys[0])
        for key in kept:
            cache.put_here(key, None)
        return wrong(why=_told(failure))
    except Exception as failure:  # whatever torch says where it has no plan
        for key in kept:
            cache.put(key, None, _told(failure))
        _require_device(layer.device, way.label(), failure)
        return wrong(why=_told(failure))
    except BaseException:  # the user's wish to stop says nothing about the way
        cache.forget(keys[0])
        raise
    if not error <= layer.allowed:  # NaN is wrong, too
        why = f"its error is {error:.1e}, more than {layer.allowed:.1e}"
        for key in kept:
            cache.put(key, None, why)
        return replace(wrong(why=why), error=error if math.isfinite(error) else None)
    cache.put(keys[0], ms)
    cache.put(keys[1], first_ms)
    return Tried(keys[0][0], way.form, way.search, True, error, ms, first_ms, "")


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def _require_device(device: torch.device, asked: str, failure: Exception) -> None:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as broken:
        raise RuntimeError(
            f"asking cuDNN for {asked} broke the GPU for this process ({failure}). It is left out "
            "from now on: run this again in a new process"
        ) from broken


def _in_new_thread(run: Callable[[], Result], device: torch.device) -> Result:
    def inside() -> Result:
        with torch.cuda.device(device), torch.inference_mode():
            return run()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(inside).result()


def _error_and_times(layer: _Layer, way: Way) -> tuple[float, float, float]:
    """The worst error of a call and a replay, both onto memory of NaN; ms of the first call, and of
    one of many in a CUDA graph."""
    with searching(way.search):
        run = layer.run(way.form)
        layer.fill_with_nan()
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        y = run()
        torch.cuda.synchronize()
        first_ms = (time.perf_counter() - start_s) * 1e3
        errors = [layer.error(y)]
        del y
        stream = torch.cuda.Stream()
        warm_up(run, stream)
        once = record(run, stream)
        once.made.fill_(math.nan)
        errors.append(layer.error(once()))
        many = record(lambda: [run() for _ in range(_IN_A_ROW)][-1], stream)
        ms = min(_timed(many) for _ in range(_ROUNDS)) / _IN_A_ROW
    return max(errors, key=lambda e: e if math.isfinite(e) else math.inf), first_ms, ms


def _timed(replay: Replay[Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
