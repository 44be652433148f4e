"""`resfuse compare A B`: the verdict as a table and sentences; the exit code is for CI."""

import argparse
from pathlib import Path

from rich.table import Table

from resfuse.bench.common.console import stdout
from resfuse.bench.common.errors import UsageError
from resfuse.bench.compare import side
from resfuse.bench.compare.pairs import Pairs, comparable, pair
from resfuse.bench.compare.side import Side
from resfuse.bench.compare.verdict import Change, Judged, Verdict, judge, noise


def compare(args: argparse.Namespace) -> int:
    """Compares two files of rows; 1 where B has a regression, 0 otherwise.

    Raises:
        UsageError: a file cannot be read, no case stands in both, or nothing tells the noise.
    """
    verdict, pairs, notes = examine(args.a, args.b, args.fail_above)
    console = stdout(None if stdout().is_terminal else 160)
    console.print(_table(verdict), highlight=False)
    for line in [
        *_failures(verdict),
        *notes,
        *_unpaired(pairs),
        *sentences(verdict, args.fail_above),
    ]:
        console.print(line, highlight=False, soft_wrap=True)
    return int(verdict.regression)


def examine(a: Path, b: Path, fail_above: float) -> tuple[Verdict, Pairs, list[str]]:
    """Returns the verdict on two files, the cases that it is based on, and notes on their rows."""
    rows_a, rows_b = side.read(a), side.read(b)
    notes = []
    shared = side.standing_in(rows_b, rows_a)
    if shared and all(shared):
        notes.append(f"Every row of {b} stands in {a}, too: this compares rows with themselves.")
    elif any(shared):
        rows_b = rows_b[[not known for known in shared]]
        notes.append(f"{_count(sum(shared), 'row')} of {b} in {a}, too: counted there alone.")
    sides = side.side(a, rows_a, side.read_facts(a)), side.side(b, rows_b, side.read_facts(b))
    notes += [f"{one.path}: {note}." for one in sides for note in one.notes]
    verdict, pairs = decide(*sides, fail_above)
    return verdict, pairs, notes


def decide(a: Side, b: Side, fail_above: float) -> tuple[Verdict, Pairs]:
    """Returns the verdict on two sides and the cases that it is based on.

    Raises:
        UsageError: no case stands in both, or nothing tells the noise.
    """
    pairs = pair(a, b)
    if not pairs.cases:
        raise UsageError(f"nothing in {b.path} can be compared with {a.path}: {_why_none(pairs)}")
    scatter = noise(comparable(a, b, pairs))
    if not scatter.degrees:
        raise UsageError(
            f"{a.path} and {b.path} do not tell the noise between runs: no case was measured "
            "twice, and no baseline against itself; measure each side at least twice"
        )
    return judge(pairs.cases, scatter, fail_above), pairs


def _why_none(pairs: Pairs) -> str:
    if not pairs.unpaired:
        return "it holds no case but baselines against themselves, whose speed-up is 1 either way"
    return _unpaired_reasons(pairs)


def _unpaired_reasons(pairs: Pairs) -> str:
    return "; ".join(
        f"{reason} ({_count(count, 'case')})" for reason, count in pairs.unpaired.most_common()
    )


def sentences(verdict: Verdict, fail_above: float) -> list[str]:
    """Returns sentences on what the table does not show, the verdict last."""
    noise = verdict.noise
    known_from = [
        _count(noise.repeats, "repeated case") if noise.repeats else "",
        f"{_count(noise.baselines, 'row')} of a baseline against itself" if noise.baselines else "",
    ]
    lines = [
        f"Noise: the same case differs by {noise.percent:.1f} % from run to run (standard "
        f"deviation, {noise.degrees} degrees of freedom, from "
        f"{' and '.join(filter(None, known_from))})."
    ]
    if verdict.mean is not None:
        lines.append(
            f"A slowdown of {_percent(max(verdict.visible, 1 + fail_above))} or more would have "
            "been flagged in every case."
        )
    if not noise.repeats:
        lines.append(
            "No case was measured twice: the others are taken to scatter like the baseline."
        )
    if abs(verdict.baseline_change - 1) > fail_above:
        longer = "longer" if verdict.baseline_change > 1 else "shorter"
        change = max(verdict.baseline_change, 1 / verdict.baseline_change)
        lines.append(
            f"The baselines themselves took {_percent(change)} {longer} in B: a machine in another "
            "state, or a change to both that paired speed-ups do not show."
        )
    count, of = sum(case.regression for case in verdict.cases), _count(len(verdict.cases), "case")
    means = " and the geometric mean" if verdict.mean_regression and len(verdict.cases) > 1 else ""
    lines.append(
        f"Regression: {count} of {of}{means}, slower by more than "
        f"{_percent(1 + fail_above)} and significantly, or failing where they passed."
        if verdict.regression
        else f"No regression beyond {_percent(1 + fail_above)} in {of}."
    )
    return lines


def _unpaired(pairs: Pairs) -> list[str]:
    return [f"Not compared: {_unpaired_reasons(pairs)}."] if pairs.unpaired else []


def _table(verdict: Verdict) -> Table:
    """Returns a table with a line for each case, regressions first, then by how much longer B
    takes."""
    table = Table(box=None)
    table.add_column("case", overflow="fold")
    for heading in ("A", "B", "time B / A", "[95 %]"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for case in sorted(verdict.cases, key=_order):
        speeds = [f"{r.speedup():.2f}x" if r.passed else "-" for r in (case.a, case.b)]
        table.add_row(case.key.label(), *speeds, *_change(case.change), _said(case))
    if verdict.mean is not None and len(verdict.cases) > 1:
        said = "REGRESSION" if verdict.mean_regression else verdict.mean_said
        table.add_row("geometric mean", "", "", *_change(verdict.mean), said)
    return table


def _order(case: Judged) -> tuple[bool, float]:
    return not case.regression, -case.change.log_ratio if case.change else 0.0


def _change(change: Change | None) -> tuple[str, str]:
    if change is None:
        return "-", ""
    low, high = change.interval
    return f"{change.ratio:.3f}", f"[{low:.3f}, {high:.3f}]"


def _said(case: Judged) -> str:
    failed = "fails" if case.b.failed else ""
    return ", ".join(filter(None, ("REGRESSION" if case.regression else "", failed, case.said)))


def _failures(verdict: Verdict) -> list[str]:
    return [
        f"{case.key.label()}: {len(case.b.failed)} of {len(case.b.failed) + len(case.b.passed)} "
        f"runs in B failed: {case.b.failed[-1]}"
        for case in verdict.cases
        if case.b.failed
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.3g} %"
