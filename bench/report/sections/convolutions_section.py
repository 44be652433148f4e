"""The page's part on single convolutions: which one is the bad one, and for whom."""

from collections.abc import Sequence
from itertools import groupby

from resfuse.bench.backends.providers import BASELINE
from resfuse.bench.records.layer_row import SHEET
from resfuse.bench.records.outcome import STATUSES
from resfuse.bench.report.data import cells
from resfuse.bench.report.data.result import Environment
from resfuse.bench.report.data.workload import KernelResult, Workload, worst_error
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.markdown import escape
from resfuse.bench.report.tables.reconcile import reconcile, sentence

NOT_ONE = "n.s."


def convolution_sections(environment: Environment) -> list[str]:
    """Returns the blocks for all workloads, none if no convolution was measured by itself."""
    blocks = []
    for (precision, math_mode), group in groupby(
        environment.workloads, key=lambda w: (w.precision, w.math_mode)
    ):
        together = list(group)
        blocks.append(
            f"## Convolutions one by one, {escape(precision)} ({escape(math_mode)} arithmetic)"
        )
        blocks.append(_introduction(together))
        for workload in together:
            blocks += _workload(workload, environment)
        if failed := _failures(together):
            blocks += ["### Failures and unavailable providers, convolution by convolution", failed]
    return blocks


def _introduction(workloads: Sequence[Workload]) -> str:
    rows = sum(len(workload.results) for workload in workloads)
    commits = list(dict.fromkeys(r.commit for w in workloads for r in w.results))
    return (
        "Every distinct convolution of a network by itself, as y = relu(conv(x) + b): the form all "
        "of them have once batch norm is folded. Adds, pooling and the classifier are not in it. "
        f"A cell is the p50 in ms and the paired speed-up over {BASELINE} with its 95 % interval; "
        f"{NOT_ONE} (not significant) where that contains 1. {BASELINE.capitalize()}'s own is the "
        "noise. Lost is count x (p50 - the fastest provider's p50). % of roofline is the floor "
        "(the arithmetic of a direct convolution, or every tensor moved once, at the ceilings of "
        "this device) divided by the fastest p50; Winograd's algorithm, which multiplies less, and "
        "on a CPU tensors that fit a cache may pass 100. On a GPU each call starts "
        "with a cold L2 cache, on a CPU with its input just written. "
        f"Made from {markdown.count(rows, 'row')} in {SHEET.file}, commit "
        f"{markdown.listing([escape(commit) for commit in commits])}."
    )


def _workload(workload: Workload, environment: Environment) -> list[str]:
    title = f"{escape(workload.model)}, {workload.img_size} px, batch {workload.batch_size}"
    blocks = [f"### {title}: convolutions"]
    if not workload.providers:
        return [*blocks, "No provider passed on any of them."]
    lines = [sentence(one) for one in reconcile(workload, environment.comparisons)]
    blocks += [_shapes(workload), _providers(workload)]
    blocks.append(
        "\n".join(f"- {line}" for line in lines)
        or "There is no row of the whole network in this environment, precision and batch to "
        "reconcile the sums with; `resfuse bench` measures one."
    )
    return blocks


def _shapes(workload: Workload) -> str:
    """Returns a table of shapes and providers, those shapes first on which the baseline loses
    most."""
    providers = workload.providers
    total = workload.total_ms(BASELINE)
    lost = {one.shape: one.ms for one in workload.lost(BASELINE)}
    rows = []
    for shape in workload.ranked():
        results, best = workload.by_shape[shape], workload.best(shape)
        own = workload.p50_ms(shape, BASELINE)
        total_ms = None if own is None else own * workload.count(shape)
        rows.append(
            [
                escape(shape),
                str(workload.count(shape)),
                *(_cell(results.get(name)) for name in providers),
                "-" if best is None else escape(best.provider),
                cells.number(best.numbers.get("sol_pct") if best else None),
                cells.number(total_ms),
                cells.number(100 * total_ms / total if total_ms is not None and total else None),
                cells.number(lost.get(shape)),
            ]
        )
    return markdown.table(
        [
            "convolution", "count", *(f"{escape(name)}, ms" for name in providers), "fastest",
            "% of roofline (direct)", f"{BASELINE} x count, ms", f"share of {BASELINE}, %",
            f"lost by {BASELINE}, ms",
        ],
        [False, True, *(False for _ in providers), False, True, True, True, True],
        rows,
    )  # fmt: skip


def _providers(workload: Workload) -> str:
    """Returns a table with a line for each provider: its sum, where it loses most, its worst
    error."""
    rows = []
    for name in workload.providers:
        own = [r for r in workload.results if r.provider == name]
        lost = workload.lost(name)
        error = worst_error([r for r in own if r.status == "pass"])
        rows.append(
            [
                escape(name),
                f"{len(lost)} of {len(workload.by_shape)}",
                cells.number(workload.total_ms(name)),
                cells.number(sum(one.ms for one in lost)),
                f"{escape(lost[0].shape)}: {cells.number(lost[0].ms)} ms"
                if lost[0].ms > 0
                else "none",
                "-"
                if error is None
                else f"{cells.number(error.numbers['rel_l2_err'])} ({escape(error.shape)})",
            ]
        )
    return markdown.table(
        ["provider", "timed", "sum of p50 x count, ms", "lost, ms", "loses most on",
         "worst error vs fp64"],
        [False, True, True, True, False, False],
        rows,
    )  # fmt: skip


def _cell(result: KernelResult | None) -> str:
    if result is None:
        return cells.EMPTY
    if result.p50_ms is None:
        return result.status
    names = ("speedup", "speedup_ci_low", "speedup_ci_high")
    known = [result.numbers[name] for name in names if name in result.numbers]
    if len(known) < len(names):
        return cells.number(result.p50_ms)
    ratio, low, high = known
    mark = "" if cells.excludes_one(low, high) else f" {NOT_ONE}"
    return f"{cells.number(result.p50_ms)}; {cells.interval(ratio, low, high)}{mark}"


def _failures(workloads: Sequence[Workload]) -> str:
    """Returns a table of status, provider, count and reason; "" where everything passed."""
    every = [(workload, result) for workload in workloads for result in workload.results]
    failed = [pair for pair in every if pair[1].status != "pass"]
    if not failed:
        return ""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for workload, result in sorted(failed, key=lambda pair: STATUSES.index(pair[1].status)):
        reason = " ".join(result.error.split()) or "no reason was recorded"
        shapes = groups.setdefault((result.status, result.provider, reason), [])
        shapes.append(f"{workload.model} {result.shape}")
    return markdown.table(
        ["status", "provider", "convolutions", "first of them", "reason"],
        [False, False, True, False, False],
        [
            [status, escape(provider), str(len(shapes)), escape(shapes[0]), escape(reason)]
            for (status, provider, reason), shapes in groups.items()
        ],
    )
