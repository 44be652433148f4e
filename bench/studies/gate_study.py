"""How often does `resfuse compare` see a slowdown where there is none, and miss one where there is?

A small network in eager mode, under another name, beside eager: each run a process of its own, as
in a sweep. Two runs in three are equal, the third has 10 % of work planted on top
(slowed_backend.py), so that both kinds see the machine in the same states. Then sides of three runs
are compared, through the code behind the command: of the equal runs each three with the next three,
as if A had been measured and then B; and each three slowed ones with the equal ones right
before and right after. The comparisons overlap, so their shares are known less well than so many
independent ones would be.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pandas as pd
from rich.progress import track

from resfuse.bench.common.console import stderr
from resfuse.bench.common.errors import UsageError
from resfuse.bench.compare.compare_command import decide
from resfuse.bench.compare.side import side
from resfuse.bench.compare.verdict import Verdict
from resfuse.bench.measuring.clock.timing import Watch, seconds
from resfuse.bench.measuring.device import resolve_device
from resfuse.bench.measuring.probes import machine
from resfuse.bench.records import results
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import Stamp
from resfuse.bench.running.subprocess_runner import run_case
from resfuse.bench.studies.harness_sheet import HARNESS, append
from resfuse.bench.studies.slowed_backend import SLOWDOWN

MODEL, IMG_SIZE = "cifar_resnet20", 32
# A tenth of it must be whole, and share out evenly among a few threads; a GPU with less waits for
# the launches and does not notice a tenth more.
BATCH_SIZES = {"cpu": 20, "cuda": 640}
KINDS = {
    "equal": "resfuse.bench.backends.eager:build",
    "slowed": "resfuse.bench.studies.slowed_backend:build",
}
CYCLE = ("equal", "slowed", "equal")
CYCLES = 28  # 56 equal runs are 51 comparisons
SIDE = 3  # runs
BUDGET_S = 660.0  # none is started later: some five seconds each, most of them set-up
FAIL_ABOVE = 0.05
OPTIONS = Options(seconds=1.0, min_rounds=20, timeout_s=120.0)

Runs = Mapping[str, Sequence[int]]  # kind -> the numbers of its runs, in the order of time


def run(args: argparse.Namespace) -> int:
    """Runs `resfuse study gate`: measures, compares, and appends and prints a row for each kind.

    Raises:
        UsageError: the results folder cannot be written, or too few runs passed.
    """
    device = resolve_device(args.device)
    results.check_writable(args.results / machine.folder_name(machine.facts(device, 0)), HARNESS)
    rows, runs = measure(device, CYCLES)
    found = [
        _row("equal", 0.0, len(rows), equal_sides(runs), rows),
        _row("slowed", SLOWDOWN, len(rows), slowed_sides(runs), rows),
    ]
    path = append(args.results, device, found)
    for row in found:
        print(
            f"{row['planted_pct']:g} % planted: {row['flagged_pct']:.1f} % of {row['comparisons']} "
            f"comparisons flagged; B / A is {row['ratio']:.3f}, "
            f"runs differ by {row['noise_pct']:.1f} %"
        )
    print(f"appended to {path}")
    return 0


def measure(device: str, cycles: int) -> tuple[pd.DataFrame, Runs]:
    """Measures all runs, and returns their rows as `compare` reads them and the runs of each
    kind."""
    batch = BATCH_SIZES[device.split(":")[0]]
    case = Case(MODEL, "subject", "inference", device, "float32", "contiguous", batch, IMG_SIZE)
    facts = machine.facts(device, 0)
    runs: dict[str, list[int]] = {kind: [] for kind in KINDS}
    watch = Watch()
    with TemporaryDirectory() as place:
        folder = Path(place)
        plan = list(CYCLE) * cycles
        for kind in track(plan, "Measuring equal and slowed runs", console=stderr()):
            if seconds(watch.elapsed()) > BUDGET_S:
                break
            outcome = run_case(case, OPTIONS, {}, backends={"subject": KINDS[kind]})
            if outcome.status == "pass":
                runs[kind].append(sum(map(len, runs.values())))
                now = datetime.now(UTC).isoformat()
                stamp = Stamp(facts["device_name"], machine.env_id(facts), "study", now)
                results.append_row(folder, CASES.record(case.identity(), outcome, stamp))
        if min(map(len, runs.values())) < SIDE or len(runs["equal"]) < 2 * SIDE:
            raise UsageError(
                f"study gate: too few runs passed: {runs}; the last: {outcome.status} "
                f"{outcome.error}"
            )
        return results.read_rows(folder), runs


def equal_sides(runs: Runs) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yields every three equal runs and the three after them."""
    equal = runs["equal"]
    for i in range(len(equal) - 2 * SIDE + 1):
        yield equal[i : i + SIDE], equal[i + SIDE : i + 2 * SIDE]


def slowed_sides(runs: Runs) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yields three slowed runs with the equal runs before or after them."""
    equal, slowed = runs["equal"], runs["slowed"]
    for i in range(len(slowed) - SIDE + 1):
        planted = slowed[i : i + SIDE]
        before = [one for one in equal if one < planted[0]][-SIDE:]
        after = [one for one in equal if one > planted[-1]][:SIDE]
        yield from ((side, planted) for side in (before, after) if len(side) == SIDE)


def _row(
    kind: str,
    planted: float,
    runs: int,
    sides: Iterator[tuple[Sequence[int], Sequence[int]]],
    rows: pd.DataFrame,
) -> dict[str, Value]:
    verdicts = [_verdict(rows.iloc[list(a)], rows.iloc[list(b)]) for a, b in sides]
    changes = [verdict.mean.ratio for verdict in verdicts if verdict.mean is not None]
    return {
        "study": "gate",
        "model": MODEL,
        "batch_size": int(rows.requested_batch_size.iloc[0]),
        "planted_pct": 100 * planted,
        "runs": runs,
        "comparisons": len(verdicts),
        "flagged_pct": 100 * sum(verdict.regression for verdict in verdicts) / len(verdicts),
        "ratio": median(changes),
        "noise_pct": median(verdict.noise.percent for verdict in verdicts),
    }


def _verdict(a: pd.DataFrame, b: pd.DataFrame) -> Verdict:
    sides = [side(Path(name), rows, {}) for name, rows in (("A", a), ("B", b))]
    return decide(sides[0], sides[1], FAIL_ABOVE)[0]
