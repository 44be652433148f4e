"""Measures choices on the device at hand, each after it has given the right answer.

A choice runs as it will in the engine, in an executor of its part of the graph alone, from caches
that hold of its inputs and weights what they will hold there (warm_timing.py).
"""

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate, key_of
from resfuse.kernels.engine.ir.graph import Graph, State, Value, state_names
from resfuse.kernels.engine.ir.torch_operations import takes_made_up_inputs
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import TACTICS, eager
from resfuse.kernels.engine.tuning.warm_timing import copies, warmth_of
from resfuse.kernels.gpu.common.graph_capture import replayed
from resfuse.kernels.gpu.cudnn.cudnn_probe import as_decided
from resfuse.kernels.ops.conv_problem import math_mode_of
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES
from resfuse.kernels.tuning_cache.denylist import NONE, Barred
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

Run = Callable[[], object]
NOT_TIMED = 0.0  # ms of what would fail on made-up inputs: indices out of range, say
Key = tuple[str, str]  # of the timing cache: a part of a graph, and what computes it

_ROUNDS = 5
# A choice that is done within _SHORT_MS runs as often in each of its turns. In a network its like
# has run just before; alone among others it finds caches full of theirs. CIFAR's ResNet-110 at
# batch 8 takes 0.87 of the time for it, since Winograd's first 3x3 takes 0.73. Longer runs told the
# same choices apart either way, for half as long again.
_IN_A_ROW = 4
_SHORT_MS = 1.0
_HOPELESS = 1.5  # times as slow as the best so far: not measured any further
# Of its time, what a tactic costs beside it where native steps stop for it and start again: with
# six of ResNet-50 and ResNeXt-50 that were up to 1 % quicker by themselves, the whole took 0.3 to
# 1.5 % more.
_LEAVING = 0.03
_ROOM_BYTES = 2 << 30  # of values, for all that are timed in turns
_SWEPT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # several second-level caches


class BrokenDevice(RuntimeError):
    """A kernel has broken the GPU for this process. It is barred: the next process does without."""


class Tuner:
    """The cost of a choice in ms, from the cache or the clock."""

    def __init__(
        self,
        graph: Graph,
        state: State,
        device: torch.device,
        tactics: Iterable[str],
        cache: TimingCache,
        barred: Barred = NONE,
    ) -> None:
        """
        Args:
            tactics: those that run on the device.
            barred: configurations that were found wrong, beside those in the cache.
        """
        self._barred = cache.barred | barred
        self._told: set[str] = set()
        self._confirmed: set[Key] = set()
        self._arena = any(TACTICS[name].in_arena for name in tactics)
        self._graph, self._state, self._device, self._cache = graph, state, device, cache
        self.measured = 0  # how many were not in the cache
        self._swept = torch.zeros(
            _SWEPT_BYTES[device.type] // 4, dtype=torch.float32, device=device
        )
        self._warmth = warmth_of(graph, state, device)
        self._copied: tuple[frozenset[str], list[tuple[dict[str, Tensor], WeightStore]]] | None = (
            None
        )
        self._least: dict[str, float] = {}
        self._reference: tuple[str, list[Tensor], list[Tensor], float] | None = None

    def __call__(self, choice: Candidate) -> float | None:
        """None where the choice fails, or computes something else; or is barred for every part.

        Raises:
            BrokenDevice: the choice has broken the device for this process; the next one knows.
        """
        if self._is_barred(choice):
            return None
        part, key = self._part(choice)
        if not self._has(key, choice):
            self.measured += 1
            self._measure(part, key, choice)
        ms = self._cache.get(key)
        return ms and ms * (1 + _LEAVING * self._is_copied(choice))

    def time_in_turns(self, choices: Sequence[Candidate]) -> None:
        """Puts the times of choices for the same nodes into the cache, all together as far as they
        have room beside each other.
        """
        part = self._graph.part(choices[0].start, choices[0].stop)
        each = sum(math.prod(v.shape) * v.dtype.itemsize for v in part.values.values())
        at_once = max(1, _ROOM_BYTES // max(1, each))
        for first in range(0, len(choices), at_once):
            self.together(choices[first : first + at_once])

    def together(self, choices: Sequence[Candidate]) -> list[float | None]:
        """Costs of choices for the same nodes, timed in turns: the speed of a machine may change
        between one and the next by more than what tells them apart.

        Raises:
            BrokenDevice: a choice has broken the device for this process; the next one knows.
        """
        open_to_all = [choice for choice in choices if not self._is_barred(choice)]
        keys = [self._part(choice)[1] for choice in open_to_all]
        if not all(map(self._has, keys, open_to_all)):
            part, weight_store = self._part(open_to_all[0])[0], WeightStore()
            runs: dict[Key, tuple[Candidate, Run]] = {}
            for key, choice in zip(keys, open_to_all, strict=True):
                if (run := self._checked(part, key, choice, weight_store)) is not None:
                    runs[key] = choice, run
            for key, ms in self._in_turns(runs).items():
                self.measured += 1
                self._cache.put(key, ms)
        return [self(choice) for choice in choices]

    def _in_turns(self, runs: Mapping[Key, tuple[Candidate, Run]]) -> dict[Key, float]:
        """The least ms of each that does not fail."""
        least = dict.fromkeys(runs, math.inf)
        for turn in range(_ROUNDS):
            limit = _HOPELESS * min(least.values(), default=math.inf)
            for key, (choice, run) in runs.items():
                if key in least and (turn < 2 or least[key] <= limit):
                    ms = None
                    with self._barring(key, choice):
                        ms = self._turn(run)
                    if ms is None:
                        del least[key]
                    else:
                        least[key] = min(least[key], ms)
        return least

    def _turn(self, run: Run) -> float:
        """The least ms of a run, or of several where they are short."""
        least = self._once_cold(run)
        for _ in range(_IN_A_ROW - 1):
            if least > _SHORT_MS:
                break
            least = min(least, self._once_cold(run))
        return least

    def knows(self, choice: Candidate) -> bool:
        """Whether asking for its cost measures nothing."""
        return self._is_barred(choice) or self._has(self._part(choice)[1], choice)

    def confirm(self, choices: Iterable[Candidate]) -> bool:
        """Whether each has given the right answer in this build; what has not is barred. The cache
        is a file, and no proof of it. Takes 0.7 of 3 s that ResNet-50 at batch 1 is built in from
        known times (one thread of a Xeon).
        """
        right = True
        for choice in choices:
            part, key = self._part(choice)
            known = choice.tactic == "eager" or key in self._confirmed or self._cache.is_own(key)
            if not known and takes_made_up_inputs(part):
                self._confirmed.add(key)
                right = self._right(part, key, choice) is not None and right
        return right

    def _has(self, key: Key, choice: Candidate) -> bool:
        """Whether the cache says what a choice costs. That torch's own operations, the last resort,
        would fail is not taken from a file."""
        if key not in self._cache or self._cache.is_own(key):
            return key in self._cache
        return choice.tactic != "eager" or self._cache.get(key) is not None

    def _part(self, choice: Candidate) -> tuple[Graph, Key]:
        """What the choice computes, and under which key its time is kept."""
        part = self._graph.part(choice.start, choice.stop)
        copied = ", copied" * self._is_copied(choice)
        return part, (key_of(part), choice.label() + copied + self._warmth.label)

    def _is_barred(self, choice: Candidate) -> bool:
        configuration = getattr(TACTICS[choice.tactic].load(), "configuration", None)
        if not self._barred or configuration is None:
            return False
        found = configuration(self._graph, choice) in self._barred
        if found and choice.label() not in self._told:
            self._told.add(choice.label())
            warnings.warn(
                f"{choice.label()} is left out: `resfuse check` found it wrong on this device",
                stacklevel=4,
            )
        return found

    def _measure(self, part: Graph, key: Key, choice: Candidate) -> None:
        """Puts a time into the cache, or why there is none."""
        run = self._checked(part, key, choice)
        if run is not None:
            with self._barring(key, choice):
                self._cache.put(key, self._time(run, key[0]))

    @contextlib.contextmanager
    def _barring(self, key: Key, choice: Candidate) -> Iterator[None]:
        """Bars a choice that fails within: for good where the failure is the tactic's own."""
        try:
            yield
        except torch.OutOfMemoryError as failure:  # another day there may be room
            self._cache.put_here(key, None)
            _warn(choice, key[0], f"finds no room: {failure}")
        except _failures() as failure:
            why = _told(failure)
            self._cache.put(key, None, why)
            self._require_device(key, choice, failure)
            _warn(choice, key[0], f"fails, {why}")
        except Exception as failure:
            if self._device.type != "cuda":
                raise
            # A mistake of ours, or of a library's, that no CPU has met: the engine does without.
            self._cache.put_here(key, None)
            self._require_device(key, choice, failure)
            _warn(choice, key[0], f"is left out of this build, {_told(failure)}")

    def _checked(
        self, part: Graph, key: Key, choice: Candidate, weight_store: WeightStore | None = None
    ) -> Run | None:
        """What is to be timed, run before and right; None where it is not, put into the cache."""
        if not takes_made_up_inputs(part):
            self._cache.put_here(key, NOT_TIMED)  # torch's, and nothing else computes it
            return None
        if (right := self._right(part, key, choice, weight_store)) is not None:
            with self._barring(key, choice):
                return self._timed(part, *right, choice)
        return None

    def _right(
        self, part: Graph, key: Key, choice: Candidate, weight_store: WeightStore | None = None
    ) -> tuple[Executor, list[Tensor]] | None:
        """What computes the part, and inputs it is right for; None where it is not: barred."""
        inputs, exact, allowed = self._expected(part, key[0])
        with self._barring(key, choice):
            executor = Executor(part, [choice.at_start()], self._state, weight_store)
            error = _error(executor(*inputs), exact)
            if error <= allowed:
                return executor, inputs
            why = f"its error is {error:.1e}, more than {allowed:.1e}"  # NaN is wrong, too
            self._cache.put(key, None, why)
            _warn(choice, key[0], f"is barred, {why}")
        return None

    def _require_device(self, key: Key, choice: Candidate, failure: Exception) -> None:
        """After an illegal access a GPU answers nothing, and every tactic would be barred."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as broken:
            self._cache.put(key, None, _told(failure))
            raise BrokenDevice(
                f"{choice.label()} broke the GPU for this process ({failure}). It is barred now: "
                "build the engine again in a new process"
            ) from broken

    def _timed(
        self, part: Graph, executor: Executor, inputs: list[Tensor], choice: Candidate
    ) -> Run:
        """The executor as the clock is to see it, run once."""
        run = executor.repeat(*inputs)
        if self._device.type == "cuda":  # kernels without the Python that launches them
            made = replayed(self._in_a_row(part, run, inputs, choice), self._device)
        else:
            made = _copying(run) if self._is_copied(choice) else run
        made()
        return made

    def _in_a_row(self, part: Graph, run: Run, inputs: list[Tensor], choice: Candidate) -> Run:
        """As many runs as one is timed by, on copies of the weights where these are to be cold."""
        if self._warmth.in_a_row == 1:
            return run
        runs = [run]
        for state, weight_store in self._copies(part):
            runs.append(Executor(part, [choice.at_start()], state, weight_store).repeat(*inputs))

        def row() -> None:
            for turn in range(self._warmth.in_a_row):
                runs[turn % len(runs)]()

        return row

    def _copies(self, part: Graph) -> list[tuple[dict[str, Tensor], WeightStore]]:
        """Copies of the part's weights, for all choices for it; those of the last part only."""
        names = frozenset(state_names(part))
        if self._copied is None or self._copied[0] != names:
            self._copied = None  # they make room first
            self._copied = names, copies(names, self._state, self._warmth)
        return self._copied[1]

    def _is_copied(self, choice: Candidate) -> bool:
        """Whether its outputs would have to be copied to where native steps read them.

        Most nodes are native where there are native steps at all. Without the copies in the time,
        ResNet-50 at batch 8 was planned with ten of oneDNN's convolutions, each a few percent
        faster, and the whole was slower.
        """
        return self._arena and not TACTICS[choice.tactic].in_arena

    def _expected(self, part: Graph, key: str) -> tuple[list[Tensor], list[Tensor], float]:
        """Inputs, outputs in fp64, and the error allowed: EAGER_FACTOR times eager's, a floor."""
        if self._reference is None or self._reference[0] != key:
            generator = torch.Generator(self._device).manual_seed(0)
            inputs = [_random(part.values[name], generator) for name in part.reads]
            exact = eager.exact(part, self._state, inputs)
            choices = [Candidate("eager", at, at + 1) for at in range(len(part.nodes))]
            math_mode = math_mode_of(_floating(part), self._device)
            with as_decided(self._device, math_mode):  # torch keeps the plans of the first run
                own = _error(Executor(part, choices, self._state)(*inputs), exact)
            floor = TOLERANCES[math_mode].rtol
            self._reference = key, inputs, exact, EAGER_FACTOR * own + floor
        return self._reference[1:]

    def _time(self, run: Run, key: str) -> float:
        times: list[float] = []
        for _ in range(_ROUNDS):
            times.append(self._once_cold(run))
            if len(times) == 2 and min(times) > _HOPELESS * self._least.get(key, float("inf")):
                break
        ms = min(times)  # whatever else the machine does only adds
        self._least[key] = min(ms, self._least.get(key, float("inf")))
        return ms

    def _once_cold(self, run: Run) -> float:
        """ms of a run, or of one in a row, behind a sweep of the caches: what they still hold of a
        row is what its runs leave to each other."""
        if self._warmth.swept:
            self._swept.add_(1)
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / self._warmth.in_a_row
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3


def _failures() -> tuple[type[Exception], ...]:
    """What counts as a tactic's own failure: it is unsupported, or cannot be compiled, or run.
    Everything else is a mistake of ours, or the user's wish to stop.

    Triton's errors are looked up among what is loaded: without it nobody raises one.
    """
    triton = sys.modules.get("triton.errors")
    return (RuntimeError, ValueError, *([triton.TritonError] if triton else []))


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def _warn(choice: Candidate, key: str, what: str) -> None:
    warnings.warn(f"{choice.label()} {what} on {key}", stacklevel=6)


def _copying(run: Callable[[], list[Tensor]]) -> Run:
    places = [torch.empty_like(y) for y in run()]

    def again() -> None:
        for place, y in zip(places, run(), strict=True):
            place.copy_(y)

    return again


def _random(value: Value, generator: torch.Generator) -> Tensor:
    """As activations are: as many below zero as above; channels_last."""
    device = generator.device
    if not value.dtype.is_floating_point:
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    x = torch.randn(value.shape, generator=generator, dtype=torch.float32, device=device).to(
        value.dtype
    )
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _floating(part: Graph) -> torch.dtype:
    found = [v.dtype for v in part.values.values() if v.dtype.is_floating_point]
    return found[0] if found else torch.float32


def _error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error in norm; infinite where something is no number."""
    worst = 0.0
    for y, expected in zip(got, exact, strict=True):
        difference = (y.double() - expected.double()).norm()
        error = (difference / expected.double().norm().clamp_min(1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
