"""contention.csv -> CONTENTION.md and its picture: what is left of each backend's speed."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resfuse.bench.report.data.palette import looks
from resfuse.bench.report.plots.figure import STYLE, legend, panels, save
from resfuse.bench.report.study_pages import CONTENTION, CONTENTION_PICTURE
from resfuse.bench.report.tables.markdown import count, escape, table
from resfuse.bench.studies.contention.scenarios import QUIET, SCENARIOS

_HOW = """\
One network, while others use the same cores. *Beside 2 (nice 10, pinned to one CPU)*: two processes
that never rest, of the priority of background jobs, both on the first CPU; *normal* ones have the
priority of the network itself. *Networks in threads*: several Python threads, each with a network
of its own, in one process; the rate is that of all of them together. Each backend has its own
process and as many threads as torch; they take turns of 0.7 s, and every answer is checked. The
*ratio* is of images/s in neighbouring turns: the median, and its 95 % interval."""
_TITLES = ("beside it", "backend", "p50, ms", "p99, ms", "images/s", "p50, times quiet", "ratio")


def write(home: Path, rows: pd.DataFrame) -> Path:
    """Writes the page and its picture of these rows beside them; returns the page's path."""
    known = _standing(rows)
    with matplotlib.style.context(STYLE):
        save(picture(known), home / CONTENTION_PICTURE)
    path = home / CONTENTION
    path.write_text(page(known), encoding="utf-8", newline="\n")
    return path


def page(rows: pd.DataFrame) -> str:
    """Returns the page in Markdown, from the newest rows."""
    blocks = ["# Beside busy neighbours", _HOW, f"![images/s beside others]({CONTENTION_PICTURE})"]
    for (model, batch, threads), group in _settings(rows):
        passed = group[group.status == "pass"]
        baselines = [name for name in passed.baseline.unique() if name]
        blocks.append(f"## {escape(model)}, batch {batch}, {count(threads, 'thread')}")
        if baselines:
            blocks.append(f"The ratio is to {' and '.join(map(escape, baselines))}.")
        blocks.append(table(_TITLES, (False, False, *[True] * 5), _lines(passed)))
        others = group[group.status != "pass"].drop_duplicates(["backend", "error"])
        for row in others.to_dict("records"):
            said = escape(str(row["error"]))
            blocks.append(f"- {escape(str(row['backend']))}: {row['status']}: {said}")
    last = rows.iloc[-1]
    blocks.append(
        f"Written by `resfuse study contention` from contention.csv: environment {last.env_id}, "
        f"commit {last.commit}."
    )
    return "\n\n".join(blocks) + "\n"


def _standing(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the last row of each measurement in the newest environment."""
    own = rows[rows.env_id == rows.iloc[-1].env_id]
    what = ["model", "batch_size", "threads", "backend", "scenario"]
    standing: pd.DataFrame = own.drop_duplicates(what, keep="last")
    return standing


def _settings(rows: pd.DataFrame) -> list[tuple[tuple[str, int, int], pd.DataFrame]]:
    what = ["model", "batch_size", "threads"]
    found = rows.groupby(what, sort=False)
    return [((str(m), int(str(b)), int(str(t))), group) for (m, b, t), group in found]


def _lines(passed: pd.DataFrame) -> list[list[str]]:
    lines = []
    for scenario in [name for name in SCENARIOS if name in set(passed.scenario)]:
        title = SCENARIOS[scenario].title
        for row in passed[passed.scenario == scenario].to_dict("records"):
            ratio = "" if math.isnan(row["speedup"]) else _ratio(row)
            slowdown = "" if math.isnan(row["slowdown"]) else f"{row['slowdown']:.2f}"
            lines.append([
                title, escape(str(row["backend"])), f"{row['latency_p50_ms']:.1f}",
                f"{row['latency_p99_ms']:.1f}", f"{row['samples_per_sec']:.1f}", slowdown, ratio,
            ])  # fmt: skip
            title = ""
    return lines


def _ratio(row: dict[Hashable, Any]) -> str:
    return f"{row['speedup']:.2f} [{row['speedup_ci_low']:.2f}, {row['speedup_ci_high']:.2f}]"


def picture(rows: pd.DataFrame) -> Figure:
    """Draws a panel for each network and batch: images/s of each backend in each scenario, in
    percent of what the fastest backend has alone (the largest, where quiet was not measured)."""
    settings = [(key, group[group.status == "pass"]) for key, group in _settings(rows)]
    settings = [(key, group) for key, group in settings if len(group)]
    names = [name for name in SCENARIOS if any(name in set(g.scenario) for _, g in settings)]
    appearance = looks(rows.backend.unique())
    columns = min(2, max(1, len(settings)))
    lines = -(-len(settings) // columns) or 1
    figure, grid = panels(lines, columns, 0.27 * max(1, len(names)) + 0.5)
    axes = [ax for row in grid for ax in row]
    for ax, ((model, batch, threads), group) in zip(axes, settings, strict=False):
        quiet = group[group.scenario == QUIET]
        best = (quiet if len(quiet) else group).samples_per_sec.max()
        for backend, own in group.groupby("backend", sort=False):
            look = appearance[str(backend)]
            ax.plot(
                100 * own.samples_per_sec / best,
                [names.index(name) for name in own.scenario],
                linestyle="", marker=look.marker, color=look.colour, alpha=0.85,
            )  # fmt: skip
        ax.set_title(f"{model}, batch {batch}, {count(threads, 'thread')}")
        shown = ax in [row[0] for row in grid]
        ax.set_yticks(range(len(names)), [SCENARIOS[n].title if shown else "" for n in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlim(0)
        ax.grid()
    for ax in axes[len(settings) :]:
        ax.remove()
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="", label=name)
        for name, look in appearance.items()
        if name in set(rows[rows.status == "pass"].backend)
    ]
    if handles:
        legend(figure, handles)
    figure.supxlabel("images/s, % of the fastest backend alone; higher is better", fontsize=9)
    return figure
