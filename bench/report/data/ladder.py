"""Every way to run one network beside the others: a line each, and how many times faster it is than
eager, torch.compile, ONNX Runtime and OpenVINO.

A row of rows.csv is paired with one baseline. Where a backend took turns with the baseline of a
column, that ratio stands. Where it did not, the two rows' speed-ups over eager are divided: each is
paired with eager in a process of its own, so what slows the machine for an hour cancels. Such a
ratio is marked as indirect, and its interval is wider.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.result import Comparison, Environment, Result, Setting, label

EAGER = "eager contiguous"
# The columns of the tables, as far as there are rows of them: what people run networks with today.
BASELINES = ("eager", "compiled", "onnxrt", "openvino", "tensorrt")
INTERVAL = ("speedup", "speedup_ci_low", "speedup_ci_high")


@dataclass(frozen=True)
class Ratio:
    """How many times faster, and its 95 % interval; `paired` where the two took turns."""

    value: float
    low: float
    high: float
    paired: bool = True

    def text(self) -> str:
        """Returns `1.25 ±0.02`, `~1.25 ±0.03` if it is indirect, and `same` if 1 is in the
        interval."""
        half = max(self.high - self.value, self.value - self.low)
        digits = 1 if self.value >= 10 else 2
        number = f"{'' if self.paired else '~'}{self.value:.{digits}f} ±{half:.{digits}f}"
        return number if cells.excludes_one(self.low, self.high) else f"same ({number})"


@dataclass(frozen=True)
class Line:
    """One backend in one memory format at one batch size."""

    result: Result  # the row beside eager, or else the latest
    ratios: Mapping[str, Ratio | None]  # by baseline; None: it is the baseline of this column

    @property
    def label(self) -> str:
        return self.result.label

    @property
    def is_beside_eager(self) -> bool:
        return self.result.baseline.startswith("eager ")


@dataclass(frozen=True)
class Network:
    """One network under one setting, whose `baseline` is empty: rows of all baselines meet here."""

    setting: Setting
    model: str
    img_size: int  # pixels
    lines: tuple[Line, ...]  # by batch, the fastest first

    @property
    def baselines(self) -> tuple[str, ...]:
        """Returns the baselines that any line has a ratio over."""
        return tuple(
            name for name in BASELINES if any(line.ratios.get(name) for line in self.lines)
        )

    @property
    def batches(self) -> list[int]:
        return sorted({line.result.batch_size for line in self.lines})

    def at(self, batch: int) -> list[Line]:
        return [line for line in self.lines if line.result.batch_size == batch]


def networks(environment: Environment) -> list[Network]:
    """Returns the networks of an environment that have a time, in the order of its comparisons."""
    found: dict[tuple[Setting, str, int], list[Result]] = {}
    for comparison in environment.comparisons:
        setting = replace(comparison.setting, baseline="")
        for result in comparison.measured:
            found.setdefault((setting, result.model, result.img_size), []).append(result)
    return [
        Network(setting, model, size, _lines(results))
        for (setting, model, size), results in found.items()
    ]


def baseline_rows(environment: Environment) -> list[Comparison]:
    """Returns the comparisons whose baseline was measured against itself."""
    return [c for c in environment.comparisons if any(r.is_baseline for r in c.measured)]


def _lines(results: Sequence[Result]) -> tuple[Line, ...]:
    lines: list[Line] = []
    for batch in sorted({result.batch_size for result in results}):
        here = [result for result in results if result.batch_size == batch]
        # label -> baseline -> row
        rows: dict[str, dict[str, Result]] = {}
        for result in here:
            rows.setdefault(result.label, {})[result.baseline] = result
        references = _references(rows)
        own = [
            Line(_standing(beside, references["eager"]), _ratios(name, rows, references))
            for name, beside in rows.items()
        ]
        lines += sorted(own, key=_fastest_first)
    return tuple(lines)


def _standing(beside: Mapping[str, Result], eager: str) -> Result:
    """Returns the row whose time is shown: the one beside eager, or else the latest."""
    return max(beside.values(), key=lambda r: (_label(r.baseline) == eager, r.timestamp))


def _references(rows: Mapping[str, Mapping[str, Result]]) -> dict[str, str]:
    """Returns the label that represents each baseline: for eager, the memory format that most rows
    were paired with; for others the faster one here, or else one that rows were paired with."""
    every = [result for beside in rows.values() for result in beside.values()]
    eager = Counter(_label(r.baseline) for r in every if r.baseline.startswith("eager "))
    found = {"eager": eager.most_common(1)[0][0] if eager else "eager"}
    for name in BASELINES[1:]:
        timed = {
            own: ratio.value
            for own in {result.label for result in every if result.backend == name}
            if (ratio := _turns(own, found["eager"], rows))
        }
        asked = sorted(_label(r.baseline) for r in every if r.baseline.startswith(f"{name} "))
        if timed or asked:
            found[name] = max(timed, key=lambda own: timed[own]) if timed else asked[0]
    return found


def _ratios(
    name: str, rows: Mapping[str, Mapping[str, Result]], references: Mapping[str, str]
) -> dict[str, Ratio | None]:
    found: dict[str, Ratio | None] = {}
    for baseline, reference in references.items():
        if name == reference:
            found[baseline] = None
        elif ratio := _over(name, reference, rows, references["eager"]):
            found[baseline] = ratio
    return found


def _over(
    name: str, reference: str, rows: Mapping[str, Mapping[str, Result]], eager: str
) -> Ratio | None:
    """Returns the ratio of `name` over `reference`, from their turns or by way of eager."""
    if turns := _turns(name, reference, rows):
        return turns
    mine, other = _over_eager(name, rows, eager), _over_eager(reference, rows, eager)
    return None if mine is None or other is None else divided(mine, other)


def _over_eager(name: str, rows: Mapping[str, Mapping[str, Result]], eager: str) -> Ratio | None:
    """Returns the ratio from turns with eager, or by way of a backend that took turns with both."""
    if name == eager:  # its own row says how noisy the run was, which belongs to no ratio
        return Ratio(1.0, 1.0, 1.0)
    if turns := _turns(name, eager, rows):
        return turns
    for between in sorted(_label(result.baseline) for result in rows.get(name, {}).values()):
        first, second = _turns(name, between, rows), _turns(between, eager, rows)
        if first and second:
            return divided(first, Ratio(1 / second.value, 1 / second.high, 1 / second.low))
    return None


def _turns(name: str, reference: str, rows: Mapping[str, Mapping[str, Result]]) -> Ratio | None:
    """Returns the row's own ratio, None unless the two took turns."""
    own = rows.get(name, {}).values()
    result = next((r for r in own if _label(r.baseline) == reference), None)
    value, low, high = (result.numbers.get(each, 0.0) if result else 0.0 for each in INTERVAL)
    return Ratio(value, low, high) if min(value, low, high) > 0 else None


def _label(baseline: str) -> str:
    """Returns the label in tables of a baseline in rows, `<backend> <memory format>`."""
    backend, _, memory_format = baseline.rpartition(" ")
    return label(backend, memory_format)


def divided(one: Ratio, other: Ratio) -> Ratio:
    """Returns the quotient of two independent ratios; relative half-widths add up in squares."""

    def apart(ratio: Ratio, end: float) -> float:
        return abs(math.log(end / ratio.value))

    value = one.value / other.value
    below = math.hypot(apart(one, one.low), apart(other, other.high))
    above = math.hypot(apart(one, one.high), apart(other, other.low))
    return Ratio(value, value * math.exp(-below), value * math.exp(above), paired=False)


def _fastest_first(line: Line) -> tuple[bool, float, float]:
    """Sorts by the speed-up over eager, where known: times of different hours do not compare."""
    over = line.ratios.get("eager")
    if over is None and "eager" in line.ratios:
        return (False, -1.0, 0.0)
    return (over is None, -over.value if over else 0.0, line.result.numbers["p50_ms"])
