"""model_speeds.csv -> the part of MODELS.md on speed, and its picture: one dot a network.

Wherever networks or families are listed, those on which the engine does worst come first.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resfuse.bench.backends import stays_in_fp32
from resfuse.bench.measuring.probes.idle import BUSY_CORES
from resfuse.bench.records.case import USUAL_PRECISION
from resfuse.bench.report.data.palette import looks
from resfuse.bench.report.plots.figure import legend, panels
from resfuse.bench.report.study_pages import MODELS_PICTURE
from resfuse.bench.report.tables.markdown import count, escape, image, listing, table
from resfuse.bench.studies.models.networks import FAMILY, OTHER

OURS = ("engine", "fused")
_SETTING = ("precision", "batch_size", "requested_img_size")
_HOW = """\
All backends of a network take turns in one process, in fp32 where no other precision is named, and
in the memory format that is the fastest each takes, eager in channels_last; every answer is checked
against fp64, in int8 by the error that a simulation has. Ratios are of images/s, taken round by
round: the median, and its 95 % interval. *Best peer*: the fastest of the others on that network, in
the same precision. *Build*: seconds to the engine's first answer, and of a second build, which
finds the measured times of the first. *Memory*: peak of weights, activations and workspace."""
_FAMILY_TITLES = (
    "family",
    "networks",
    "engine / best peer, lowest",
    "median",
    "fused / eager, lowest",
)

Row = dict[Hashable, object]


@dataclass(frozen=True)
class Network:
    """The rows of one network in one setting, by backend."""

    name: str
    batch_size: int
    img_size: int  # as asked for
    rows: dict[str, Row]
    precision: str = USUAL_PRECISION

    @property
    def commit(self) -> str:
        return str(next(iter(self.rows.values()))["commit"])

    @property
    def setting(self) -> str:
        named = "" if self.precision == USUAL_PRECISION else f", {self.precision}"
        return f"batch {self.batch_size}, {self.img_size} pixels{named}"

    @property
    def family(self) -> str:
        return FAMILY.get(self.name, OTHER)

    @property
    def best_peer(self) -> str | None:
        """The peer over which the engine's ratio is the smallest; None without one."""
        ratios = {
            backend: ratio
            for backend in self.rows
            if backend not in OURS
            and not stays_in_fp32(backend, self.precision)
            and (ratio := self.over(backend)) is not None
        }
        return min(ratios, key=ratios.__getitem__) if ratios else None

    @property
    def over_best(self) -> float:
        """NaN without a peer."""
        ratio = None if self.best_peer is None else self.over(self.best_peer)
        return math.nan if ratio is None else ratio

    @property
    def fused_over_eager(self) -> float | None:
        return self.number("fused", "speedup")

    def over(self, backend: str) -> float | None:
        """How many times as fast as a backend the engine is."""
        return self.number(backend, "engine_speedup")

    def number(self, backend: str, column: str) -> float | None:
        row = self.rows.get(backend)
        value = math.nan if row is None or row["status"] != "pass" else float(str(row[column]))
        return value if math.isfinite(value) else None

    def interval(self, backend: str, column: str) -> str:
        """Returns "1.20 [1.10, 1.30]", or "" where the ratio is not known."""
        parts = [self.number(backend, f"{column}{end}") for end in ("", "_ci_low", "_ci_high")]
        if any(part is None for part in parts):
            return ""
        ratio, low, high = (f"{part:.2f}" for part in parts)
        return f"{ratio} [{low}, {high}]"


def newest(rows: pd.DataFrame) -> list[Network]:
    """Returns the networks of the newest environment, in each setting by the rows of the newest
    commit that has them, and each backend's last row."""
    own = rows[rows.env_id == rows.iloc[-1].env_id]
    own = own.assign(precision=own.precision.replace("", USUAL_PRECISION))
    own = own[own.commit == own.groupby([*_SETTING, "network"]).commit.transform("last")]
    own = own.drop_duplicates([*_SETTING, "network", "backend"], keep="last")
    return [
        Network(
            str(name),
            int(float(str(batch))),
            int(float(str(size))),
            {str(row["backend"]): row for row in group.to_dict("records")},
            str(precision),
        )
        for (precision, batch, size, name), group in own.groupby([*_SETTING, "network"])
    ]


def blocks(rows: pd.DataFrame) -> list[str]:
    """Returns the blocks of the page, from rows of model_speeds.csv, which are not none."""
    networks = newest(rows)
    found = ["## Speed", "\n".join(f"- {_summary(own)}" for own in _by_setting(networks))]
    if _measured(networks):
        found.append(image(MODELS_PICTURE, "engine / best peer, a dot for each network"))
    found.append(_HOW)
    for own in _by_setting(networks):
        setting = own[0].setting
        measured = _measured(own)
        peers = sorted({name for one in measured for name in one.rows} - set(OURS))
        if measured:
            found += [f"### Families, {setting}", _families(measured), f"### Networks, {setting}"]
            found.append(
                table(
                    ("network", "pixels", "best peer",
                     *(f"engine / {_named(peer, own[0].precision)}" for peer in peers),
                     "fused / eager", "MACs fused", "build, s", "memory, MB",
                     "of the best peer"),
                    (False, True, False, *[True] * (len(peers) + 5)),
                    [_cells(one, peers) for one in measured],
                )
            )  # fmt: skip
    if failed := _failures(networks):
        found += ["### What was not measured", "\n".join(failed)]
    found.append(
        f"Written by `resfuse study models --kinds speed` from model_speeds.csv: environment "
        f"{rows.iloc[-1].env_id}, {_commits(networks)}."
    )
    return found


def _commits(networks: Sequence[Network]) -> str:
    """Returns "commit 1234", or each commit with its settings where there are several."""
    settings: dict[str, list[str]] = {}
    for own in _by_setting(networks):
        for commit in dict.fromkeys(one.commit for one in own):
            settings.setdefault(commit, []).append(own[0].setting)
    if len(settings) == 1:
        return f"commit {next(iter(settings))}"
    told = (f"{commit} ({'; '.join(of)})" for commit, of in settings.items())
    return f"commits {listing(list(told))}"


def _by_setting(networks: Sequence[Network]) -> list[list[Network]]:
    def setting(one: Network) -> tuple[bool, str, int, int]:
        usual = one.precision == USUAL_PRECISION
        return not usual, one.precision, one.batch_size, one.img_size

    return [
        [one for one in networks if setting(one) == each]
        for each in sorted({*map(setting, networks)})
    ]


def _measured(networks: Sequence[Network]) -> list[Network]:
    """Those with an engine and a peer, the worst for the engine first."""
    known = [one for one in networks if math.isfinite(one.over_best)]
    return sorted(known, key=lambda one: (one.over_best, one.name))


def _summary(networks: Sequence[Network]) -> str:
    measured = _measured(networks)
    ratios = [one.over_best for one in measured]
    said = f"{networks[0].setting}: {count(len(measured), 'network')}"
    if ratios:
        slower = sum(ratio < 1 for ratio in ratios)
        families = len({one.family for one in measured})
        said += (
            f" of {families} {'family' if families == 1 else 'families'}; engine / best peer "
            f"{median(ratios):.2f} in the median, {ratios[0]:.2f} at the lowest "
            f"({escape(measured[0].name)}), below 1 on {slower}"
        )
    fused = [ratio for one in networks if (ratio := one.fused_over_eager) is not None]
    if fused:
        said += f"; fused / eager {median(fused):.2f} in the median, {min(fused):.2f} at the lowest"
    loads = [load for one in networks if (load := one.number("engine", "other_load")) is not None]
    if loads and max(loads) > BUSY_CORES:
        said += f"; other processes kept up to {max(loads):.1f} cores busy"
    return said


def _families(measured: Sequence[Network]) -> str:
    members: dict[str, list[Network]] = {}
    for one in measured:  # the family with the lowest ratio first
        members.setdefault(one.family, []).append(one)
    lines = []
    for name, own in members.items():
        ratios = [one.over_best for one in own]
        fused = [ratio for one in own if (ratio := one.fused_over_eager) is not None]
        least = f"{min(fused):.2f}" if fused else ""
        lines.append(
            [escape(name), str(len(own)), f"{min(ratios):.2f}", f"{median(ratios):.2f}", least]
        )
    return table(_FAMILY_TITLES, (False, True, True, True, True), lines)


def _cells(one: Network, peers: Sequence[str]) -> list[str]:
    best = one.best_peer or ""
    builds = [one.number("engine", column) for column in ("setup_s", "rebuild_s")]
    return [
        escape(one.name),
        _text(one.number("engine", "img_size"), ".0f"),
        escape(best),
        *(one.interval(peer, "engine_speedup") for peer in peers),
        one.interval("fused", "speedup"),
        _text(one.number("fused", "macs_fused_pct"), ".0f", " %"),
        ", again ".join(_text(s, ".1f") for s in builds if s is not None),
        *(_text(one.number(name, "peak_mem_mb"), ".0f") for name in ("engine", best)),
    ]


def _named(peer: str, precision: str) -> str:
    return f"{peer} in fp32" if stays_in_fp32(peer, precision) else peer


def _text(number: float | None, form: str, unit: str = "") -> str:
    return "" if number is None else f"{number:{form}}{unit}"


def _failures(networks: Sequence[Network]) -> list[str]:
    """A line for each network, batch and reason, with the backends that have it."""
    lines = []
    for one in networks:
        ends: dict[str, list[str]] = {}
        for backend, row in one.rows.items():
            if row["status"] != "pass":
                ends.setdefault(f"{row['status']}: {row['error']}", []).append(backend)
        lines += [
            f"- {escape(one.name)}, {one.setting}, {escape(listing(who))}: {escape(said)}"
            for said, who in ends.items()
        ]
    return lines


def picture(rows: pd.DataFrame) -> Figure | None:
    """Draws a panel for each setting: engine / best peer, a dot for each network, a line for
    each family, the lowest at the top; None where no network has both."""
    measured = _measured(newest(rows))
    if not measured:
        return None
    batches = _by_setting(measured)
    families = list(dict.fromkeys(one.family for one in measured))
    peers = sorted({peer for own in batches for one in own if (peer := one.best_peer)})
    appearance = looks(peers)
    figure, grid = panels(1, len(batches), 0.19 * len(families) + 0.8)
    for ax, own in zip(grid[0], batches, strict=True):
        for peer in peers:
            dots = [one for one in own if one.best_peer == peer]
            ax.plot(
                [one.over_best for one in dots],
                [families.index(one.family) for one in dots],
                linestyle="", marker=appearance[peer].marker, color=appearance[peer].colour,
                alpha=0.8, markersize=4.5,
            )  # fmt: skip
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(own[0].setting)
        ax.set_yticks(range(len(families)), families if ax is grid[0][0] else [""] * len(families))
        ax.set_ylim(len(families) - 0.5, -0.5)
        ax.grid()
    handles = [
        Line2D([], [], linestyle="", marker=appearance[peer].marker, color=appearance[peer].colour,
               label=f"best peer: {peer}")
        for peer in peers
    ]  # fmt: skip
    legend(figure, handles)
    figure.supxlabel("engine / best peer, images/s; right of 1 the engine is faster", fontsize=9)
    return figure
