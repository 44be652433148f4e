"""How `resfuse bench` begins and ends on the screen: what can run and how busy the machine is; then
a short table of how many times faster each backend is."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from rich.table import Table

from resfuse.bench.backends import stays_in_fp32
from resfuse.bench.measuring.probes.idle import BUSY_CORES
from resfuse.bench.records.case import MOST, SERVER, THROUGHPUT, Case
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.report.data.result import label
from resfuse.bench.running.progress import QUANTILES, is_beside_other_work

MOST_COLUMNS = 4  # networks side by side in 80 characters

Measured = Sequence[tuple[Case, Outcome]]


def cannot_run(unavailable: Mapping[str, str]) -> list[str]:
    """Returns a line for each reason why backends cannot run here."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in unavailable.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"Cannot run here: {', '.join(names)}: {why}" for why, names in by_reason.items()]


def conditions(found: Mapping[str, Any]) -> str:
    """Says what other work the survey saw on this machine, and how wide intervals will be; "" where
    it did not look."""
    if "other_load" not in found:
        return ""
    load, width = found["other_load"], 100 * found["interval"]
    expected = f"expect 95 % intervals of about ±{width:.1f} % of a speed-up"
    if load <= BUSY_CORES:
        return f"The machine is quiet: {expected}."
    busy = ", ".join(f"{name} {cores:.1f}" for name, cores in found["busy_with"])
    names = f" ({busy})" if busy else ""
    return (
        f"The machine is BUSY: other processes use {load:.1f} cores{names}. Times will be too long "
        f"and this run may take twice as long; {expected}. Rows say how busy it was."
    )


def by_load(measured: Measured) -> list[Measured]:
    """Returns the cases apart by how their batches came, so that no table mixes them."""
    found: dict[tuple[str, float, float], list[tuple[Case, Outcome]]] = {}
    for case, outcome in measured:
        load = case.scenario, case.qps, case.latency_bound_ms
        found.setdefault(load, []).append((case, outcome))
    return list(found.values())


def short_tables(measured: Measured) -> tuple[str, list[Table]]:
    """Returns a title, and tables of how many times faster than the baseline each backend was, a
    column a network and batch, that fit 80 characters; of scenario server, of what it measures.

    Args:
        measured: cases that `by_load` has put together.
    """
    columns = list(dict.fromkeys(_column(case) for case, _ in measured))
    several = {
        name: len({getattr(c, name) for c, _ in measured}) > 1 for name in ("precision", "mode")
    }
    return _title(measured), [
        _table(measured, columns[first : first + MOST_COLUMNS], several)
        for first in range(0, len(columns), MOST_COLUMNS)
    ]


def _title(measured: Measured) -> str:
    load = measured[0][0].load
    if load.scenario == SERVER:
        found = "" if load.requested_qps == MOST else ": ms from arrival to answer, p50 / p90 / p99"
        return f"{load.text().capitalize()}{found}"
    baselines = dict.fromkeys(map(_baseline, (case for case, _ in measured)))
    what = "Throughput, times that of" if load.scenario == THROUGHPUT else "Times faster than"
    return f"{what} {' or '.join(baselines)} (±: half of the 95 % interval)"


def _baseline(case: Case) -> str:
    in_fp32 = " in fp32" * stays_in_fp32(case.baseline, case.precision)
    return f"{label(case.baseline, case.baseline_memory_format)}{in_fp32}"


def beside_other_work(measured: Measured) -> str:
    """Says how many rows were taken while other processes used the machine; "" where none."""
    passed = [outcome for _, outcome in measured if outcome.status == "pass"]
    busy = [float(o.metrics["other_load"] or 0) for o in passed if is_beside_other_work(o)]
    if not busy:
        return ""
    return (
        f"{len(busy)} of {len(passed)} rows were taken beside other work (up to {max(busy):.1f} "
        "cores busy): measure again on a quiet machine before you quote them."
    )


def _column(case: Case) -> tuple[str, int, int, str, str]:
    return case.model, case.img_size, case.batch_size, case.precision, case.mode


def _table(
    measured: Measured,
    columns: Sequence[tuple[str, int, int, str, str]],
    several: Mapping[str, bool],
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("", no_wrap=True)
    for model, _, batch, precision, mode in columns:
        more = [precision] * several["precision"] + [mode] * several["mode"]
        table.add_column("\n".join([model, f"batch {batch}", *more]), justify="right")
    cells: dict[str, dict[tuple[str, int, int, str, str], str]] = {}
    order: dict[str, float] = {}
    for case, outcome in measured:
        name = label(case.backend, case.memory_format)
        if outcome.status == "unavailable" or _column(case) not in columns:
            continue
        cells.setdefault(name, {})[_column(case)] = _cell(case, outcome)
        order[name] = max(order.get(name, 0.0), _rank(case, outcome))
    for name in sorted(cells, key=lambda each: -order[each]):
        table.add_row(name, *(cells[name].get(column, "-") for column in columns))
    return table


def _rank(case: Case, outcome: Outcome) -> float:
    """Returns what is the greater the better a case did."""
    found = outcome.metrics
    if case.scenario == SERVER:
        p99_ms = float(found.get("p99_ms") or inf)
        return 1 / p99_ms if case.qps else float(found.get("qps") or 0)
    return 1.0 if case.is_baseline else float(found.get("speedup") or 0)


def _cell(case: Case, outcome: Outcome) -> str:
    if outcome.status != "pass":
        return outcome.status
    if case.scenario == SERVER:
        if not case.qps:
            return f"{float(outcome.metrics['qps'] or 0):.4g}"
        return " / ".join(f"{float(outcome.metrics[f'{n}_ms'] or 0):.3g}" for n in QUANTILES)
    low, ratio, high = (
        float(outcome.metrics[name] or 0)
        for name in ("speedup_ci_low", "speedup", "speedup_ci_high")
    )
    half = max(high - ratio, ratio - low)
    return f"1.00 ±{half:.2f}" if case.is_baseline else f"{ratio:.2f} ±{half:.2f}"
