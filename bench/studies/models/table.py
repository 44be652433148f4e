"""models.csv -> MODELS.md: counts, and a line for each network."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from resfuse.bench.report.markdown import escape, table

FILE = "MODELS.md"
_TITLES = ("network", "pixels", "conv", "MACs fused", "eager", "fuse", "engine")
_LONGEST = 90  # characters of a reason: the CSV has the whole

Row = Mapping[Hashable, object]


def write(home: Path, rows: pd.DataFrame, kinds: Sequence[str]) -> Path:
    """Writes the table of these rows beside them; returns its path."""
    path = home / FILE
    path.write_text(page(rows, kinds), encoding="utf-8", newline="\n")
    return path


def page(rows: pd.DataFrame, kinds: Sequence[str]) -> str:
    """The newest environment and commit: of each network the last answer of each kind.

    Args:
        rows: of models.csv, not empty, in the order they were measured.
        kinds: what was compared: fuse, engine.
    """
    last = rows.iloc[-1]
    rows = rows[(rows.env_id == last.env_id) & (rows.commit == last.commit)]
    networks = [_merged(answers, kinds) for _, answers in rows.groupby("network", sort=True)]
    cells = [_cells(row, kinds) for row in networks]
    return "\n\n".join(
        [
            "# Other people's networks, answered by fuse and the engine",
            "Random weights, batch norms calibrated, real images; errors are relative L2 against "
            "fp64, eager's the worse of both memory formats. A pass is at most twice eager's "
            "error. A number after fuse and engine is a pass, in eager's errors. "
            f"`resfuse study models`, environment {last.env_id}, commit {last.commit}.",
            "\n".join(f"- {kind}: {_counts(networks, kind)}" for kind in kinds),
            table(_TITLES, (False, True, True, True, True, True, True), cells),
        ]
    ) + "\n"  # fmt: skip


def _merged(answers: pd.DataFrame, kinds: Sequence[str]) -> Row:
    """One row of several: each kind's answer from the last that has it, the rest what is known."""
    merged: dict[Hashable, object] = dict(answers.ffill().to_dict("records")[-1])
    for kind in kinds:
        asked = answers[answers[f"{kind}_status"] != ""].to_dict("records")
        if asked:
            merged |= {name: v for name, v in asked[-1].items() if str(name).startswith(kind)}
    return merged


def _counts(networks: Sequence[Row], kind: str) -> str:
    found = Counter(str(row[f"{kind}_status"] or "not compared") for row in networks)
    return ", ".join(f"{number} {status}" for status, number in found.most_common())


def _cells(row: Row, kinds: Sequence[str]) -> list[str]:
    numbers = [_number(row[name], form) for name, form in (
        ("img_size", "{:.0f}"), ("convolutions", "{:.0f}"), ("macs_fused_pct", "{:.0f} %"),
        ("eager_rel_l2", "{:.1e}"),
    )]  # fmt: skip
    return [escape(str(row["network"])), *numbers, *(_answer(row, kind) for kind in kinds)]


def _answer(row: Row, kind: str) -> str:
    status, said = str(row[f"{kind}_status"]), str(row[f"{kind}_error"])
    error, eager = float(str(row[f"{kind}_rel_l2"])), float(str(row["eager_rel_l2"]))
    ratio = f"{error / eager:.2f}" if eager > 0 else f"{error:.1e}"
    if status == "pass":
        return ratio
    if said:
        cut = said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"
        return f"{status}: {escape(cut)}"
    return f"{status}: {ratio}" if status else ""


def _number(value: object, form: str) -> str:
    number = float(str(value))
    return form.format(number) if number == number else ""
