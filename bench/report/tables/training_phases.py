"""Where a training step's time goes: forward, backward, optimizer."""

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.result import Comparison, Result
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.column import BACKEND, BATCH, Column, of_metric, render

PHASES = ("train_fwd_time", "train_bwd_time", "train_opt_time")


def _backward_share(result: Result) -> str:
    parts = [result.numbers.get(name) for name in PHASES]
    known = [part for part in parts if part is not None]
    if len(known) < len(PHASES) or sum(known) == 0:
        return cells.EMPTY
    return cells.number(100 * known[1] / sum(known))


COLUMNS = (
    Column("model", lambda r: markdown.escape(r.model), right=False),
    BATCH,
    BACKEND,
    of_metric("step p50, ms", "p50_ms"),
    of_metric("forward, ms", "train_fwd_time"),
    of_metric("backward, ms", "train_bwd_time"),
    of_metric("optimizer, ms", "train_opt_time"),
    Column("backward share, %", _backward_share),
    of_metric("activations, MB", "train_activation_mem_mb", optional=True),
    of_metric("one process alone, ms", "train_alone_time", optional=True),
    of_metric("scaling, %", "train_scaling_pct", optional=True),
    of_metric("communication, ms", "train_comm_time", optional=True),
)


def training_split(comparison: Comparison) -> str:
    """Returns the table, or nothing where no row has the split (inference)."""
    split = [r for r in comparison.measured if any(name in r.numbers for name in PHASES)]
    return render(COLUMNS, split) if split else ""
