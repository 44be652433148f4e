"""`resfuse study models`, once its arguments are parsed: a process for many networks, a row each.

A network that kills the process, or hangs it, costs its own row: the next one gets a new process.
"""

import argparse
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.progress import track

from resfuse.bench import machine, results
from resfuse.bench.console import stderr
from resfuse.bench.measured import Value
from resfuse.bench.results import Sheet
from resfuse.bench.selection import pick
from resfuse.bench.studies.models import table
from resfuse.bench.studies.models.compare import compare
from resfuse.bench.studies.models.networks import NETWORKS

KINDS = ("fuse", "engine")
SHEET = Sheet(
    "models.csv",
    (
        "network", "img_size", "param_count", "convolutions", "macs_fused_pct", "eager_rel_l2",
        "fuse_status", "fuse_rel_l2", "fuse_error", "engine_status", "engine_rel_l2",
        "engine_error", "env_id", "commit",
    ),
    frozenset(
        ("network", "fuse_status", "fuse_error", "engine_status", "engine_error", "env_id",
         "commit")
    ),
    "resfuse study models",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compares the networks that were asked for; returns 1 if one failed other than by refusing.

    Raises:
        UsageError: an unknown network, or a results folder that cannot be written.
    """
    wanted = pick("--model", args.model or ["*"], NETWORKS, "resfuse study models --list")
    if args.list:
        print("\n".join(wanted))
        return 0
    kinds = pick("--kinds", args.kinds, KINDS)
    facts = machine.facts("cpu", 0)
    where = {"env_id": machine.env_id(facts), "commit": machine.commit()}
    home = args.results / machine.folder_name(facts)
    results.check_writable(home, SHEET)
    if args.resume:
        done = settled(home, where, kinds)
        wanted = [network for network in wanted if network not in done]
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for row in rows(wanted, args.img_size, args.timeout, kinds):
        results.append_row(home, {**dict.fromkeys(SHEET.columns), **row, **where}, SHEET)
        for kind in kinds:
            counts[kind][str(row[f"{kind}_status"])] += 1
            if row[f"{kind}_status"] != "pass":
                print(f"{row['network']}: {kind} {row[f'{kind}_status']}: {row[f'{kind}_error']}")
    for kind in kinds:
        print(f"{kind}: {', '.join(f'{n} {how}' for how, n in counts[kind].most_common())}")
    if results.has_rows(home, SHEET):
        table.write(home, results.read_rows(home, SHEET, only_whole=True), KINDS)
        print(f"appended to {home / SHEET.file}, and written out in {table.FILE}")
    return int(any(counts[kind][how] for kind in kinds for how in ("wrong", "crash", "error")))


def settled(home: Path, where: dict[str, str], kinds: Sequence[str]) -> set[str]:
    """The networks that this environment and commit have an answer of each kind of."""
    if not results.has_rows(home, SHEET):
        return set()
    known = results.read_rows(home, SHEET, only_whole=True)
    ours = known[(known.env_id == where["env_id"]) & (known.commit == where["commit"])]
    done = [set(ours.network[ours[f"{kind}_status"] != ""]) for kind in kinds]
    return set.intersection(*done)


def rows(
    wanted: Sequence[str], img_size: int, timeout_s: float, kinds: Sequence[str] = KINDS
) -> Iterator[dict[str, Value]]:
    """A row for each network, also for one whose process died or took too long."""
    pool = _pool()
    try:
        for network in track(wanted, "Comparing", console=stderr()):
            try:
                yield pool.submit(compare, network, img_size, kinds).result(timeout_s)
            except (BrokenProcessPool, TimeoutError) as failure:
                timed_out = isinstance(failure, TimeoutError)
                said = f"not done after {timeout_s:g} s" if timed_out else "the process died"
                status = "timeout" if timed_out else "crash"
                yield _failed(network, img_size, kinds, status, said)
                _kill(pool)
                pool = _pool()
            except Exception as failure:  # eager itself cannot run it
                said = f"eager: {failure}"[:300]
                yield _failed(network, img_size, kinds, "no_reference", said)
    finally:
        _kill(pool)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(cancel_futures=True)


def _failed(
    network: str, img_size: int, kinds: Sequence[str], status: str, said: str
) -> dict[str, Value]:
    told = {f"{kind}_{column}": text for kind in kinds
            for column, text in (("status", status), ("error", said))}  # fmt: skip
    return {"network": network, "img_size": img_size, **told}
