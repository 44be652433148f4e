"""Tuner: measures the time of every candidate on the device at hand, after checking its answer. All
measurements for an engine are made here.

A candidate runs as it will in the engine, in an executor for its part of the graph alone.
"""

import contextlib
import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate, key_of
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.ir.graph_state import state_names
from resfuse.kernels.engine.ir.torch_operations import accepts_random_inputs
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import TACTICS
from resfuse.kernels.engine.tuning.candidate_failures import described, failures, warn_of
from resfuse.kernels.engine.tuning.clock import PRUNE_RATIO, ROUNDS, Clock, Run
from resfuse.kernels.engine.tuning.exact_answers import ExactAnswer, exact_answer
from resfuse.kernels.engine.tuning.warm_timing import copies, warmth_of
from resfuse.kernels.gpu.common.graph_capture import replayed
from resfuse.kernels.tuning_cache.denylist import NONE, Barred
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

# ms of candidates that random inputs would make fail, indices out of range, or that run only once
NOT_TIMED = 0.0
Key = tuple[str, str]  # of the timing cache: a part of a graph, and the candidate that computes it

# The share of its own time that a tactic outside the arena costs in addition, because native steps
# stop for it and start again: with six such candidates, each up to 1 % faster alone, ResNet-50 and
# ResNeXt-50 took 0.3 to 1.5 % longer.
NATIVE_EXIT_PENALTY = 0.03
_BYTES_IN_TURNS = 2 << 30  # the most bytes of values of candidates that are timed in turns


class BrokenDevice(RuntimeError):
    """A kernel has broken the GPU for this process. It is barred, so the next process avoids it."""


class Tuner:
    """Measures the time of candidates in ms, or takes it from the timing cache."""

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
            tactics: names of the tactics that run on the device.
            barred: configurations found wrong, besides those in the cache.
        """
        self._barred = cache.barred | barred
        self._warned: set[str] = set()
        self._confirmed: set[Key] = set()
        self._arena = any(TACTICS[name].in_arena for name in tactics)
        self._graph, self._state, self._device, self._cache = graph, state, device, cache
        self.measured = 0  # the number of candidates that were not in the cache
        self._warmth = warmth_of(graph, state, device)
        self._clock = Clock(device, self._warmth)
        self._copied: tuple[frozenset[str], list[tuple[dict[str, Tensor], WeightStore]]] | None = (
            None
        )
        self._least: dict[str, float] = {}
        self._exact: tuple[str, ExactAnswer] | None = None

    def tune(self, groups: Iterable[Sequence[Candidate]]) -> dict[Candidate, float]:
        """Returns the ms of each candidate that may be used: one that gives the right answer and is
        not barred.

        On a CPU the candidates of a group are timed in turns; on a GPU, whose speed changes less,
        one after another, once all of their kernels are compiled.

        Args:
            groups: candidates for the same nodes.

        Raises:
            BrokenDevice: a candidate has broken the device for this process; the next one knows.
        """
        groups = list(groups)
        if self._device.type == "cuda":
            self._compile_ahead(groups)
        times: dict[Candidate, float] = {}
        for group in groups:
            timed = self._one_by_one if self._device.type == "cuda" else self._as_memory_allows
            times |= _usable(group, timed(group))
        return times

    def tune_in_turns(self, groups: Iterable[Sequence[Candidate]]) -> dict[Candidate, float]:
        """Returns what `tune` returns, with all candidates of a group timed in turns on any device,
        however much memory they take."""
        times: dict[Candidate, float] = {}
        for group in groups:
            times |= _usable(group, self.in_turns(group))
        return times

    def __call__(self, candidate: Candidate) -> float | None:
        """Returns the ms of a candidate, None where it fails, gives a wrong answer or is barred.

        Raises:
            BrokenDevice: the candidate has broken the device for this process; the next one avoids
                it.
        """
        if self._is_barred(candidate):
            return None
        part, key = self._part(candidate)
        if not self._has(key, candidate):
            self.measured += 1
            self._measure(part, key, candidate)
        ms = self._cache.get(key)
        return ms and ms * (1 + NATIVE_EXIT_PENALTY * self._leaves_arena(candidate))

    def in_turns(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Returns the ms of candidates for the same nodes, timed in turns, since the speed of a
        machine may change by more than the candidates differ.

        Raises:
            BrokenDevice: a candidate has broken the device for this process; the next one avoids
                it.
        """
        allowed = [c for c in candidates if not self._is_barred(c)]
        keys = [self._part(candidate)[1] for candidate in allowed]
        if not all(map(self._has, keys, allowed)):
            part, weight_store = self._part(allowed[0])[0], WeightStore()
            runs: dict[Key, tuple[Candidate, Run]] = {}
            for key, candidate in zip(keys, allowed, strict=True):
                if (run := self._checked(part, key, candidate, weight_store)) is not None:
                    runs[key] = candidate, run
            times = self._time_in_turns(runs)
            spread = _spread(times.values())
            for key, turns in times.items():
                self.measured += 1
                again = self._cache.is_to_be_taken_again(key)
                before = self._cache.get(key) if again else None
                self._cache.put(key, min([*turns, before or math.inf]), spread=spread)
        return [self(candidate) for candidate in candidates]

    def knows(self, candidate: Candidate) -> bool:
        """Returns whether the time of a candidate is known without a measurement."""
        return self._is_barred(candidate) or self._has(self._part(candidate)[1], candidate)

    def confirm(self, candidates: Iterable[Candidate]) -> bool:
        """Checks the answer of each candidate that this build has not checked yet, since the timing
        cache, a file, proves nothing. Returns whether all are right; wrong ones are barred.

        It takes 0.7 of the 3 s in which ResNet-50 at batch 1 is built from known times (one thread
        of a Xeon).
        """
        right = True
        for candidate in candidates:
            part, key = self._part(candidate)
            eager = candidate.tactic == "eager"
            known = eager or key in self._confirmed or self._cache.is_own(key)
            if not known and accepts_random_inputs(part):
                self._confirmed.add(key)
                right = self._right(part, key, candidate) is not None and right
        return right

    def _compile_ahead(self, groups: Sequence[Sequence[Candidate]]) -> None:
        """Compiles the Triton kernels of all candidates that are to be measured."""
        from resfuse.kernels.engine.tuning.compile_ahead import compile_ahead

        every = (candidate for group in groups for candidate in group)
        unknown = (candidate for candidate in every if not self.knows(candidate))
        major, minor = torch.cuda.get_device_capability(self._device)
        compile_ahead(self._graph, self._state, unknown, 10 * major + minor)

    def _one_by_one(self, candidates: Sequence[Candidate]) -> list[float | None]:
        return [self(candidate) for candidate in candidates]

    def _as_memory_allows(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Returns the ms of candidates for the same nodes, timed in turns by as many at a time as
        fit in _BYTES_IN_TURNS."""
        part = self._graph.part(candidates[0].start, candidates[0].stop)
        each = sum(math.prod(v.shape) * v.dtype.itemsize for v in part.values.values())
        at_once = max(1, _BYTES_IN_TURNS // max(1, each))
        times: list[float | None] = []
        for first in range(0, len(candidates), at_once):
            times += self.in_turns(candidates[first : first + at_once])
        return times

    def _time_in_turns(self, runs: Mapping[Key, tuple[Candidate, Run]]) -> dict[Key, list[float]]:
        """Returns the ms of each run that does not fail, turn by turn."""
        times: dict[Key, list[float]] = {key: [] for key in runs}
        for turn in range(ROUNDS):
            least = (min(turns) for turns in times.values() if turns)
            limit = PRUNE_RATIO * min(least, default=math.inf)
            for key, (candidate, run) in runs.items():
                if key in times and (turn < 2 or min(times[key]) <= limit):
                    ms = None
                    with self._barring(key, candidate):
                        ms = self._clock.turn(run)
                    if ms is None:
                        del times[key]
                    else:
                        times[key].append(ms)
        return times

    def _has(self, key: Key, candidate: Candidate) -> bool:
        """Returns whether the cache has the time of a candidate. Failures of torch's own
        operations, the last resort, are not believed if they come from a file."""
        if key not in self._cache or self._cache.is_own(key):
            return key in self._cache
        if self._cache.is_to_be_taken_again(key):
            return False
        return candidate.tactic != "eager" or self._cache.get(key) is not None

    def _part(self, candidate: Candidate) -> tuple[Graph, Key]:
        """Returns the part of the graph that a candidate computes, and the cache key of its
        time."""
        part = self._graph.part(candidate.start, candidate.stop)
        return part, (key_of(part), candidate.label() + self._warmth.label)

    def _is_barred(self, candidate: Candidate) -> bool:
        configuration = getattr(TACTICS[candidate.tactic].load(), "configuration", None)
        if not self._barred or configuration is None:
            return False
        barred = configuration(self._graph, candidate) in self._barred
        if barred and candidate.label() not in self._warned:
            self._warned.add(candidate.label())
            warnings.warn(
                f"{candidate.label()} is left out: `resfuse check` found it wrong on this device",
                stacklevel=4,
            )
        return barred

    def _measure(self, part: Graph, key: Key, candidate: Candidate) -> None:
        """Puts a candidate's time into the cache, or the reason why there is none."""
        run = self._checked(part, key, candidate)
        if run is not None:
            with self._barring(key, candidate):
                ms = self._clock.least(run, self._least.get(key[0], math.inf))
                self._least[key[0]] = min(ms, self._least.get(key[0], math.inf))
                self._cache.put(key, ms)

    @contextlib.contextmanager
    def _barring(self, key: Key, candidate: Candidate) -> Iterator[None]:
        """Bars a candidate that fails in this context: for this build only if memory ran out or the
        mistake is resfuse's, otherwise for good."""
        try:
            yield
        except torch.OutOfMemoryError as failure:  # another build may have enough memory
            self._cache.put_here(key, None)
            warn_of(candidate, key[0], f"finds no room: {failure}")
        except failures() as failure:
            why = described(failure)
            self._cache.put(key, None, why)
            self._require_device(key, candidate, failure)
            warn_of(candidate, key[0], f"fails, {why}")
        except Exception as failure:
            if self._device.type != "cuda":
                raise
            # A mistake of resfuse or a library that shows on a GPU only: build without it.
            self._cache.put_here(key, None)
            self._require_device(key, candidate, failure)
            warn_of(candidate, key[0], f"is left out of this build, {described(failure)}")

    def _checked(
        self,
        part: Graph,
        key: Key,
        candidate: Candidate,
        weight_store: WeightStore | None = None,
    ) -> Run | None:
        """Returns a run to be timed, once its answer is right; otherwise puts the reason into the
        cache and returns None."""
        if not accepts_random_inputs(part):
            self._cache.put_here(key, NOT_TIMED)  # only torch computes such a part
            return None
        if (right := self._right(part, key, candidate, weight_store)) is not None:
            with self._barring(key, candidate):
                return self._timed(part, *right, candidate)
        return None

    def _right(
        self,
        part: Graph,
        key: Key,
        candidate: Candidate,
        weight_store: WeightStore | None = None,
    ) -> tuple[Executor, list[Tensor]] | None:
        """Returns an executor of the part whose answer is right, and its inputs; otherwise bars the
        candidate and returns None."""
        exact = self._exact_answer(part, key[0])
        with self._barring(key, candidate):
            executor = Executor(part, [candidate.at_start()], self._state, weight_store)
            error = exact.error_of(executor(*exact.inputs))
            if error <= exact.allowed:
                return executor, exact.inputs
            why = f"its error is {error:.1e}, more than {exact.allowed:.1e}"  # NaN is wrong, too
            self._cache.put(key, None, why)
            warn_of(candidate, key[0], f"is barred, {why}")
        return None

    def _require_device(self, key: Key, candidate: Candidate, failure: Exception) -> None:
        """Raises BrokenDevice if the GPU no longer responds, as after an illegal access; otherwise
        every following tactic would be barred."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as broken:
            self._cache.put(key, None, described(failure))
            raise BrokenDevice(
                f"{candidate.label()} broke the GPU for this process ({failure}). It is barred "
                "now: build the engine again in a new process"
            ) from broken

    def _timed(
        self, part: Graph, executor: Executor, inputs: list[Tensor], candidate: Candidate
    ) -> Run:
        """Returns the function that is timed for a candidate, after one run."""
        run = executor.repeat(*inputs)
        if self._device.type == "cuda":  # kernels without the Python that launches them
            timed = replayed(self._in_a_row(part, run, inputs, candidate), self._device)
        else:
            timed = run
        timed()
        return timed

    def _in_a_row(self, part: Graph, run: Run, inputs: list[Tensor], candidate: Candidate) -> Run:
        """Returns a function of as many runs in a row as the warmth asks for, on copies of the
        weights if these are to be cold."""
        if self._warmth.in_a_row == 1:
            return run
        runs = [run]
        for state, weight_store in self._copies(part):
            executor = Executor(part, [candidate.at_start()], state, weight_store)
            runs.append(executor.repeat(*inputs))

        def row() -> None:
            for turn in range(self._warmth.in_a_row):
                runs[turn % len(runs)]()

        return row

    def _copies(self, part: Graph) -> list[tuple[dict[str, Tensor], WeightStore]]:
        """Returns copies of the part's weights, shared by all candidates for it; only the last
        part's are cached."""
        names = frozenset(state_names(part))
        if self._copied is None or self._copied[0] != names:
            self._copied = None  # frees their memory first
            self._copied = names, copies(names, self._state, self._warmth)
        return self._copied[1]

    def _leaves_arena(self, candidate: Candidate) -> bool:
        """Returns whether native steps would stop for a candidate, on a device that has them."""
        return self._arena and not TACTICS[candidate.tactic].in_arena

    def _exact_answer(self, part: Graph, key: str) -> ExactAnswer:
        """Returns the part's answer in fp64; the last one is cached."""
        if self._exact is None or self._exact[0] != key:
            self._exact = key, exact_answer(part, self._state, self._device)
        return self._exact[1]


def _spread(times: Iterable[Sequence[float]]) -> float:
    """Returns how much longer the candidates of a group typically took in a turn than in their
    shortest one, as a share of it: little on a machine that does nothing else.
    """
    shares = [statistics.median(turns) / min(turns) - 1 for turns in times]
    return statistics.median(shares) if shares else 0.0


def _usable(
    candidates: Sequence[Candidate], times: Sequence[float | None]
) -> dict[Candidate, float]:
    return {c: ms for c, ms in zip(candidates, times, strict=True) if ms is not None}
