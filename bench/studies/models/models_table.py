"""models.csv and model_speeds.csv -> MODELS.md: speed (see speed_table.py); and of the answers
counts, a line for each family, what did not pass, and every network."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import matplotlib.style
import pandas as pd

from resfuse.bench.report.plots.figure import STYLE, save
from resfuse.bench.report.study_pages import MODELS, MODELS_PICTURE
from resfuse.bench.report.tables.markdown import count, escape, table
from resfuse.bench.studies.models import speed_table
from resfuse.bench.studies.models.networks import FAMILY, OTHER

_FAMILY_TITLES = ("family", "networks", "MACs fused", "fuse", "engine", "largest error")
_TITLES = ("network", "pixels", "conv", "MACs fused", "eager", "fuse", "engine")
_WORDS = {
    "pass": "pass",
    "refused": "refused",
    "wrong": "wrong",
    "error": "failed",
    "crash": "crashed",
    "timeout": "took too long",
    "no_reference": "had no reference",
    "": "not compared",
}
_HOW = """\
`fuse` and `build_engine` on convolutional networks that other people wrote. Weights are random,
batch norms calibrated, images real. An answer passes if its error is at most twice eager's own plus
1e-6: relative L2, against the same network in float64. `fuse` answers batches of 2 and 3 images and
must return eager's strides; the engine answers a batch of 2. *Refused*: a ValueError that says why,
and no answer. *MACs fused* is the share of the convolutions' multiply-accumulates that `fuse`
computes by layers of its own; where it is 0, the network runs as it was."""

Row = Mapping[Hashable, object]


def write(
    home: Path,
    answers: pd.DataFrame | None,
    speeds: pd.DataFrame | None,
    kinds: Sequence[str],
) -> Path:
    """Writes the page of these rows beside them, and the picture of the speeds; returns the page's
    path."""
    if speeds is not None:
        with matplotlib.style.context(STYLE):
            figure = speed_table.picture(speeds)
            if figure is not None:
                save(figure, home / MODELS_PICTURE)
    path = home / MODELS
    path.write_text(page(answers, kinds, speeds), encoding="utf-8", newline="\n")
    return path


def page(
    answers: pd.DataFrame | None, kinds: Sequence[str], speeds: pd.DataFrame | None = None
) -> str:
    """Returns the page for the newest environment and commit of each file.

    Args:
        answers: of models.csv, not empty, in the order they were measured; None without them.
        kinds: what was compared: fuse, engine.
        speeds: of model_speeds.csv, likewise.
    """
    blocks = ["# Networks of timm and torchvision, fused and as engines"]
    if speeds is not None:
        blocks += speed_table.blocks(speeds)
    if speeds is not None and answers is not None:
        blocks.append("## Answers")
    if answers is not None:
        blocks += _answers(answers, kinds)
    return "\n\n".join(blocks) + "\n"


def _answers(rows: pd.DataFrame, kinds: Sequence[str]) -> list[str]:
    """The blocks on answers, with the last one of each kind for every network."""
    last = rows.iloc[-1]
    rows = rows[(rows.env_id == last.env_id) & (rows.commit == last.commit)]
    networks = [_merged(answers, kinds) for _, answers in rows.groupby("network", sort=True)]
    return [
        f"{count(len(networks), 'network')}, by outcome:",
        "\n".join(f"- {kind}: {_counts(networks, kind)}" for kind in kinds),
        _HOW,
        "## Families",
        "The last column is the largest error of a pass, in eager's errors: 1 is as far from "
        "float64 as eager.",
        table(
            _FAMILY_TITLES,
            (False, True, True, False, False, True),
            [_family(name, members, kinds) for name, members in _families(networks).items()],
        ),
        "## What did not pass",
        _exceptions(networks, kinds),
        "## Every network",
        "Errors: eager's against float64, the worse of both memory formats; of a pass of fuse "
        "and engine, in eager's errors.",
        table(
            _TITLES,
            (False, True, True, True, True, True, True),
            [_cells(row, kinds) for row in networks],
        ),
        f"Written by `resfuse study models` from models.csv: environment {last.env_id}, commit "
        f"{last.commit}.",
    ]


def _merged(answers: pd.DataFrame, kinds: Sequence[str]) -> Row:
    """Returns one row merged from several: each kind's answer from the last row that has it."""
    merged: dict[Hashable, object] = dict(answers.ffill().to_dict("records")[-1])
    for kind in kinds:
        asked = answers[answers[f"{kind}_status"] != ""].to_dict("records")
        if asked:
            merged |= {name: v for name, v in asked[-1].items() if str(name).startswith(kind)}
    return merged


def _families(networks: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns the families of the rows in the order of FAMILIES."""
    found: dict[str, list[Row]] = {name: [] for name in (*dict.fromkeys(FAMILY.values()), OTHER)}
    for row in networks:
        found[FAMILY.get(str(row["network"]), OTHER)].append(row)
    return {name: members for name, members in found.items() if members}


def _family(name: str, members: Sequence[Row], kinds: Sequence[str]) -> list[str]:
    shares = [share for row in members if (share := _value(row["macs_fused_pct"])) is not None]
    ends = sorted({f"{end:.0f}" for end in (min(shares), max(shares))}, key=int) if shares else []
    ratios = [
        ratio
        for row in members
        for kind in kinds
        if row[f"{kind}_status"] == "pass" and (ratio := _ratio(row, kind)) is not None
    ]
    return [
        escape(name),
        str(len(members)),
        f"{' to '.join(ends)} %" if ends else "",
        *(_counts(members, kind) for kind in kinds),
        f"{max(ratios):.2f}" if ratios else "",
    ]


def _exceptions(networks: Sequence[Row], kinds: Sequence[str]) -> str:
    """Returns a line for each answer that did not pass: network, kind, status and message."""
    lines = []
    for row in networks:
        ends = {
            kind: _end(row, kind) for kind in kinds if row[f"{kind}_status"] not in ("pass", "")
        }
        same = len(ends) > 1 and len(set(ends.values())) == 1
        endings = {" and ".join(ends): next(iter(ends.values()))} if same else ends
        lines += [
            f"- {escape(str(row['network']))}, {who}: {said}" for who, said in endings.items()
        ]
    return "\n".join(lines) or "All passed."


def _end(row: Row, kind: str) -> str:
    status, said, ratio = str(row[f"{kind}_status"]), str(row[f"{kind}_error"]), _ratio(row, kind)
    if not said and ratio is not None:
        said = f"{ratio:.2f} times eager's error"
    return f"{_WORDS.get(status, status)}{': ' * bool(said)}{escape(said)}"


def _counts(networks: Sequence[Row], kind: str) -> str:
    found = Counter(str(row[f"{kind}_status"]) for row in networks)
    return ", ".join(f"{n} {_WORDS.get(status, status)}" for status, n in found.most_common())


def _cells(row: Row, kinds: Sequence[str]) -> list[str]:
    numbers = [_number(row[name], form) for name, form in (
        ("img_size", "{:.0f}"), ("convolutions", "{:.0f}"), ("macs_fused_pct", "{:.0f} %"),
        ("eager_rel_l2", "{:.1e}"),
    )]  # fmt: skip
    return [escape(str(row["network"])), *numbers, *(_answer(row, kind) for kind in kinds)]


def _answer(row: Row, kind: str) -> str:
    status, ratio = str(row[f"{kind}_status"]), _ratio(row, kind)
    if status == "pass" and ratio is not None:
        return f"{ratio:.2f}"
    return _WORDS.get(status, status)


def _ratio(row: Row, kind: str) -> float | None:
    """Returns the error over eager's, None where one of them is unknown or eager's is 0."""
    error, eager = _value(row[f"{kind}_rel_l2"]), _value(row["eager_rel_l2"])
    return error / eager if error is not None and eager else None


def _value(cell: object) -> float | None:
    number = float(str(cell))
    return number if number == number else None


def _number(cell: object, form: str) -> str:
    number = _value(cell)
    return "" if number is None else form.format(number)
