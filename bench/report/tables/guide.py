"""How to read the page: the rules behind its numbers, and what each column means by METRICS."""

import textwrap
from collections.abc import Collection

from resfuse.bench.records.metrics import METRICS
from resfuse.bench.records.outcome import STATUSES
from resfuse.bench.report.tables import break_even, headline, markdown, training_phases

STATUS_MEANING = {
    "pass": "it ran and its outputs agree with the reference",
    "fail_accuracy": "it ran, and its outputs do not agree",
    "fail_to_run": "it raised an error or crashed",
    "oom": "it ran out of memory",
    "timeout": "it did not end within the time limit",
    "unavailable": "it cannot run on this machine",
}
PREFIXES = {"inference": "infer_", "train": "train_"}  # of the columns only one mode has
RULES = (
    "Speed-up is the median over rounds of the baseline's time divided by the backend's, the two "
    "timed in turn in one process. Above 1 is faster, below 1 slower. The interval is a 95 % "
    'bootstrap over rounds; where it contains 1 the table says "not significant". No speed-up on '
    "this page divides the times of two rows.",
    "The baseline's own row is measured against a second copy of itself: its speed-up is the noise "
    "of the run.",
    "Images/s, p50 and p90 come from the same rounds; none is dropped. Images/s is the batch "
    "divided by p50.",
    "Error is measured against fp64 with the same weights and inputs. A case that fails this check "
    "has no speed.",
    "% of roofline (direct) divides p50 into the time that the network takes at the ceilings "
    "measured on this device if every convolution is computed directly. GFLOP/s = 2 x GMACs x "
    "images/s (1 MAC = 2 FLOP); a training step counts as three forward passes. Winograd's "
    "algorithm multiplies up to four times less in a 3x3 convolution with stride 1, so both may "
    "pass 100 %; a time below what even that needs fails the row.",
    "A backend is named with its memory format unless that is contiguous (NCHW). "
    "MB = 2^20 bytes, GB = 10^9 bytes.",
    "A dash is a value that does not exist or was not measured, never a zero.",
)


def guide(modes: Collection[str], source: str) -> list[str]:
    """Returns the closing section.

    Args:
        modes: of the rows on the page; columns of the other mode are left out.
        source: what DIR in the command stands for.
    """
    other_modes = [prefix for mode, prefix in PREFIXES.items() if mode not in modes]
    shown: dict[str, str] = {}
    for column in (*headline.COLUMNS, *break_even.COLUMNS, *training_phases.COLUMNS):
        for name in column.metrics:
            if not name.startswith(tuple(other_modes)):
                shown.setdefault(name, column.title)
    statuses = ", ".join(f"{name} ({STATUS_MEANING[name]})" for name in STATUSES)
    return [
        "## How to read this",
        "\n".join(_bullet(rule) for rule in (*RULES, f"Status: {statuses}.")),
        markdown.table(
            ["title", "meaning", "unit", "column of rows.csv"],
            [False] * 4,
            [
                [title, markdown.escape(METRICS[name].meaning), METRICS[name].unit or "-", name]
                for name, title in shown.items()
            ],
        ),
        f"This page and its plots are made from the CSV files alone; {source} makes them again.",
    ]


def _bullet(text: str) -> str:
    return textwrap.fill(f"- {text}", 110, subsequent_indent="  ", break_on_hyphens=False)
