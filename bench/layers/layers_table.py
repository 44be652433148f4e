"""The convolutions of one network beside the whole network, as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from resfuse.bench.report.data.cells import EMPTY, number
from resfuse.bench.report.data.workload import Workload, worst_error
from resfuse.bench.report.tables.reconcile import Reconciled


def table(workload: Workload, reconciled: Sequence[Reconciled]) -> Table:
    """Returns a table with a line for each distinct convolution in order, then sums, whole networks
    and the rest.

    Times are p50 in ms of one call; sums count each convolution as often as it occurs.
    """
    providers = workload.providers
    shown = Table(box=None, pad_edge=False)
    for title in ("convolution", "first layer"):
        shown.add_column(title, no_wrap=True)
    shown.add_column("count", justify="right")
    for name in providers:
        shown.add_column(f"{name.replace('_', ' ')}, ms", justify="right")
    shown.add_column("fastest")
    for title in ("share, %", "of floor, %", "worst error vs fp64"):
        shown.add_column(title, justify="right")
    best = {shape: _best_ms(workload, shape) for shape in workload.by_shape}
    total = sum(ms * workload.count(shape) for shape, ms in best.items() if ms is not None)
    for shape, results in workload.by_shape.items():
        fastest = workload.best(shape)
        worst = worst_error([r for r in results.values() if r.status == "pass"])
        ms, count = best[shape], workload.count(shape)
        shown.add_row(
            shape,
            next(iter(results.values())).layer,
            str(count),
            *(_cell(workload, shape, name) for name in providers),
            EMPTY if fastest is None else fastest.provider,
            number(None if ms is None else 100 * ms * count / total),
            number(fastest.numbers.get("sol_pct") if fastest else None),
            number(worst.numbers["rel_l2_err"] if worst else None),
        )
    _close(shown, workload, reconciled, total)
    return shown


def notes(workload: Workload, reconciled: Sequence[Reconciled]) -> list[str]:
    """Returns lines that explain the table: whole networks, shares, providers that failed."""
    found = []
    if workload.providers:
        found += [
            "",
            "Each convolution as y = relu(conv(x) + b). Share is of the fastest's sum; of floor is "
            "the least time by this device's ceilings over the fastest's time (above 100: "
            "Winograd's, or tensors in a cache). The rest is pooling, sums, the classifier and "
            "what runs between.",
        ]
    if reconciled:
        ways = ", ".join(f"{one.provider} as {one.backend}" for one in reconciled)
        found.append(f"Whole networks: {ways}.")
    if any(one.rest_ms < 0 for one in reconciled):
        found.append(
            "A rest below zero: by themselves the convolutions take longer than in the network."
        )
    reasons: dict[tuple[str, str, str], int] = {}
    for result in workload.results:
        if result.status != "pass":
            key = result.provider, result.status, " ".join(result.error.split())
            reasons[key] = reasons.get(key, 0) + 1
    for (provider, status, reason), count in reasons.items():
        found.append(f"{provider}: {status} on {count} of {len(workload.by_shape)}: {reason}")
    return found


def _close(
    shown: Table, workload: Workload, reconciled: Sequence[Reconciled], total: float
) -> None:
    """Adds the last lines: each provider's sum, its whole network, the rest, and its worst
    error."""
    whole = {one.provider: one for one in reconciled}
    sums, networks, rests, shares, errors = [], [], [], [], []
    for name in workload.providers:
        one = whole.get(name)
        passed = [r for r in workload.results if r.provider == name and r.status == "pass"]
        worst = worst_error(passed)
        sums.append(number(workload.total_ms(name)))
        networks.append(number(one.whole_ms if one else None))
        rests.append(number(one.rest_ms if one else None))
        shares.append(number(100 * one.rest_ms / one.whole_ms if one else None))
        errors.append(number(worst.numbers["rel_l2_err"] if worst else None))
    convolutions = sum(workload.count(shape) for shape in workload.by_shape)
    shown.add_section()
    shown.add_row()
    shown.add_row("sum", "", str(convolutions), *sums, f"{number(total)} ms")
    shown.add_row("whole network", "", "", *networks)
    shown.add_row("rest", "", "", *rests)
    shown.add_row("rest, % of the whole", "", "", *shares)
    shown.add_row("worst error vs fp64", "", "", *errors)


def _best_ms(workload: Workload, shape: str) -> float | None:
    fastest = workload.best(shape)
    return None if fastest is None else fastest.p50_ms


def _cell(workload: Workload, shape: str, provider: str) -> str:
    result = workload.by_shape[shape].get(provider)
    if result is None:
        return EMPTY
    return result.status if result.p50_ms is None else number(result.p50_ms)
