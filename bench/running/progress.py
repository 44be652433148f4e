"""What `resfuse bench` shows while it measures: a bar with the time left, and a line for each case.

The time left comes from a guess for each case, by backend and size of the network, corrected by how
long the cases took that are done.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from resfuse.bench.measuring.arrivals import LEAST_QUERIES
from resfuse.bench.measuring.probes.idle import BUSY_CORES, LIMIT_S
from resfuse.bench.records.case import SERVER, Case
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.profiles import LEAST_S

# Seconds beyond torch's import and the timed rounds, measured on two Xeon cores: fp64 references,
# checks and warm-up take 0.5 s for 1e9 multiply-accumulates of a batch; then what a backend sets
# up for itself and for the small network of the rehearsal.
PER_GMAC_S = {"cpu": 0.5, "cuda": 0.01}
SET_UP_S = {
    "compiled": 9.0,
    "compiled_max_autotune": 60.0,
    "onnxrt": 7.0,
    "onnxrt_tensorrt": 60.0,
    "openvino": 7.0,
    "tensorrt": 60.0,
    "engine": 15.0,
}
THROUGHPUT_S = 5.0  # of the fewest rounds of streams, untimed ones included
SEARCH_S = 60.0  # of a search for the highest rate, which takes longer where that is low
QUANTILES = ("p50", "p90", "p99")
SERVED = ("qps", *(f"{name}_ms" for name in QUANTILES))
TRUSTED_S = 15.0  # the guess counts as much as this many seconds of cases that are done


def expected_s(case: Case, seconds: float, gmacs: float, is_busy: bool) -> float:
    """Returns a guess at how long a case takes.

    Args:
        case: what is measured.
        seconds: of its timed rounds.
        gmacs: multiply-accumulates of one image's forward pass, in 1e9.
        is_busy: each case then waits in vain for the machine to come to rest.
    """
    kind = case.device.split(":")[0]
    if case.is_served:
        seconds = max(seconds, THROUGHPUT_S)
    if case.scenario == SERVER:
        seconds = max(seconds, LEAST_QUERIES / case.qps) if case.qps else SEARCH_S
    passes = 3 if case.mode == "train" else 1
    return (
        LEAST_S
        + seconds
        + passes * gmacs * case.batch_size * PER_GMAC_S[kind]
        + SET_UP_S.get(case.backend, 0.0)
        + is_busy * LIMIT_S[kind]
    )


class TimeLeft:
    """Seconds until all cases are done: the guesses for those to come, times what the others took
    over what was guessed for them."""

    def __init__(self, cases: Sequence[Case], guess: Callable[[Case], float]) -> None:
        self._guess = guess
        self._to_come = {id(case): guess(case) for case in cases}
        self._guessed = self._took = TRUSTED_S

    def done(self, case: Case, seconds: float) -> None:
        """Notes that a case took so long; 0 for one that needed no process."""
        guessed = self._to_come.pop(id(case), 0.0)
        if seconds > 0:
            self._guessed += guessed
            self._took += seconds

    def seconds(self, running: Case | None = None, since: float = 0.0) -> float:
        """Returns the seconds to come, while `running` has been measured for `since` seconds."""
        scale = self._took / self._guessed
        own = self._to_come.get(id(running), 0.0)
        rest = sum(self._to_come.values()) - own
        return scale * rest + max(0.0, scale * own - since)


def minutes(seconds: float) -> str:
    """Returns text such as `about 9 minutes` or `less than a minute`."""
    whole = round(seconds / 60)
    if whole == 0:
        return "less than a minute"
    return f"about {whole} minute{'s' * (whole != 1)}"


class _LeftColumn(ProgressColumn):
    """A column with text such as `7 min left`, from the task's field `left`."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds_left: Callable[[], float] = task.fields["left"]
        seconds = seconds_left()
        return Text(f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left")


def bar(console: Any) -> Progress:
    """Returns the progress bar; its tasks have a field `left`, a function that returns seconds.
    Where the console is no terminal, but a log, nothing is drawn."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        _LeftColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip


def line(case: Case, outcome: Outcome, ci: float | None) -> str:
    """Returns a case's result as one line for the terminal."""
    if outcome.status != "pass":
        return f"{case.label():<58} {outcome.status}: {outcome.error}"
    if case.scenario == SERVER:
        return f"{case.label():<58} {_served(case, outcome)}{_beside(outcome)}"
    speed = outcome.metrics["infer_samples_per_sec"] or outcome.metrics["train_samples_per_sec"]
    low, mid, high = (
        outcome.metrics[name] for name in ("speedup_ci_low", "speedup", "speedup_ci_high")
    )
    line = f"{case.label():<58} {speed:8.1f} images/s  {mid:.2f}x [{low:.2f}, {high:.2f}]"
    line += _beside(outcome)
    return f"{line} {_ended(case, outcome, ci)}" if ci else line


def _served(case: Case, outcome: Outcome) -> str:
    """Returns what a passed case of scenario server found: `83 queries/s, p50 11, p90 14, p99 21
    ms`, without the rate where it was asked for."""
    found = {name: float(value or 0) for name, value in outcome.metrics.items() if name in SERVED}
    times = ", ".join(f"{name} {found[f'{name}_ms']:.3g}" for name in QUANTILES)
    return f"{times} ms" if case.qps else f"{found['qps']:.4g} queries/s, {times} ms"


def _beside(outcome: Outcome) -> str:
    if not is_beside_other_work(outcome):
        return ""
    return f"  beside other work: {outcome.metrics['other_load']:.1f} cores"


def is_beside_other_work(outcome: Outcome) -> bool:
    """Returns whether other processes kept more of the machine busy than an idle system does."""
    load = outcome.metrics.get("other_load")
    return isinstance(load, int | float) and load > BUSY_CORES


def _ended(case: Case, outcome: Outcome, ci: float) -> str:
    """Returns text on the baseline, and on whether the interval's width or the budget ended the
    rounds."""
    metrics = outcome.metrics
    low, ratio, high = (
        float(metrics[name] or 0) for name in ("speedup_ci_low", "speedup", "speedup_ci_high")
    )
    width = (high - low) / ratio
    ended = {
        "interval": f"narrower than {100 * ci:g} %",
        "seconds": f"the time budget ended it, {100 * width:.1f} % wide",
        "rounds": f"the most rounds ended it, {100 * width:.1f} % wide",
    }
    beside = f"{case.baseline} {case.baseline_memory_format}"
    return f"against {beside} after {metrics['rounds']} rounds: {ended[str(metrics['ended_by'])]}"
