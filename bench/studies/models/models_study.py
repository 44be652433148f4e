"""`resfuse study models`, once its arguments are parsed: a row for each network, from processes
that compare one network after another. Times are speed_study.py's.

A network that kills its process, or hangs it, costs its own row: the next one gets a new process.
"""

import argparse
import contextlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import SimpleQueue

import pandas as pd
import psutil
import torch
from rich.progress import track

from resfuse.bench.common.console import stderr
from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick
from resfuse.bench.measuring.clock.timing import Watch
from resfuse.bench.measuring.probes import machine
from resfuse.bench.records import results
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import Sheet
from resfuse.bench.report.study_pages import MODELS as MODELS_PAGE
from resfuse.bench.running.worker import die_with_parent
from resfuse.bench.studies.models import models_table, speed_study
from resfuse.bench.studies.models.compare_answers import compare
from resfuse.bench.studies.models.networks import choose

KINDS, SPEED = ("fuse", "engine"), "speed"
USUAL_SIZE = 64  # pixels
# What a second attempt may change: on a busy machine a network runs out of time.
AGAIN = ("timeout", "crash")
FAILURES = ("wrong", "error", *AGAIN)
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
        UsageError: an unknown network, kind or backend, or a results folder that cannot be written.
    """
    wanted = choose(args.model or ["*"], [], "resfuse study models --list")
    if args.list:
        print("\n".join(wanted))
        return 0
    asked = pick("--kinds", args.kinds, (*KINDS, SPEED))
    if SPEED in asked and args.jobs > 1:
        raise UsageError(f"argument --jobs: {args.jobs}; times are taken one network at a time")
    facts = machine.facts("cpu", max(1, torch.get_num_threads() // args.jobs))
    home = args.results / machine.folder_name(facts)
    failed = False
    if kinds := [kind for kind in asked if kind in KINDS]:
        failed = _compare_all(args, wanted, kinds, home, facts)
    if SPEED in asked:
        failed |= speed_study.measure_all(args, wanted, home, facts)
    answers, speeds = _rows_of(home, SHEET), _rows_of(home, speed_study.SPEEDS)
    if answers is not None or speeds is not None:
        models_table.write(home, answers, speeds, KINDS)
        print(f"appended to the rows in {home}, and written out in {MODELS_PAGE}")
    return int(failed)


def _rows_of(home: Path, sheet: Sheet) -> pd.DataFrame | None:
    """Returns the rows of a sheet, None where there are none."""
    if not results.has_rows(home, sheet):
        return None
    rows = results.read_rows(home, sheet, only_whole=True)
    return rows if len(rows) else None


def _compare_all(
    args: argparse.Namespace,
    wanted: Sequence[str],
    kinds: Sequence[str],
    home: Path,
    facts: dict[str, str],
) -> bool:
    """Appends the networks' answers; returns whether one failed other than by refusing."""
    where = {"env_id": machine.env_id(facts), "commit": machine.commit()}
    results.check_writable(home, SHEET)
    results.record_environment(home, where["env_id"], facts)
    if args.resume:
        done = settled(home, where, kinds)
        wanted = [network for network in wanted if network not in done]
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    size = args.img_size or USUAL_SIZE
    for row in rows(wanted, size, args.timeout, kinds, args.jobs):
        results.append_row(home, {**dict.fromkeys(SHEET.columns), **row, **where}, SHEET)
        for kind in kinds:
            counts[kind][str(row[f"{kind}_status"])] += 1
            if row[f"{kind}_status"] != "pass":
                print(f"{row['network']}: {kind} {row[f'{kind}_status']}: {row[f'{kind}_error']}")
    for kind in kinds:
        print(f"{kind}: {', '.join(f'{n} {how}' for how, n in counts[kind].most_common())}")
    return any(counts[kind][how] for kind in kinds for how in FAILURES)


def settled(home: Path, where: dict[str, str], kinds: Sequence[str]) -> set[str]:
    """Returns the networks for which this environment and commit have all kinds of answers."""
    if not results.has_rows(home, SHEET):
        return set()
    known = results.read_rows(home, SHEET, only_whole=True)
    ours = known[(known.env_id == where["env_id"]) & (known.commit == where["commit"])]
    done = [set(ours.network[~ours[f"{kind}_status"].isin(["", *AGAIN])]) for kind in kinds]
    return set.intersection(*done)


def rows(
    wanted: Sequence[str],
    img_size: int,
    timeout_s: float,
    kinds: Sequence[str] = KINDS,
    jobs: int = 1,
) -> Iterator[dict[str, Value]]:
    """Yields a row for each network as soon as it is known, also if its process died or took too
    long.

    Args:
        jobs: how many processes compare at a time; they share the CPU's cores.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [_Worker(threads) for _ in range(jobs)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def row(network: str) -> dict[str, Value]:
        worker = idle.get()
        try:
            return worker.row(network, img_size, timeout_s, kinds)
        finally:
            idle.put(worker)

    waiters = ThreadPoolExecutor(jobs)
    try:
        asked = [waiters.submit(row, network) for network in wanted]
        for done in track(as_completed(asked), "Comparing", len(asked), console=stderr()):
            yield done.result()
        for worker in workers:
            worker.end()
    finally:
        waiters.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()


def _result(asked: Future[dict[str, Value]], pid: int, limit_s: float) -> dict[str, Value]:
    """Returns the answer of a process within `limit_s` of its CPU time, which a busy machine does
    not change.

    Raises:
        TimeoutError: it has used that much, or has waited as long without using any.
    """
    with contextlib.suppress(psutil.NoSuchProcess):  # it died: `asked` says so
        process = psutil.Process(pid)
        began = moved = sum(process.cpu_times()[:2])
        idle = Watch()
        while not wait([asked], min(1.0, limit_s)).done:
            used_s = sum(process.cpu_times()[:2])
            if used_s - moved > 0.01:
                moved, idle = used_s, Watch()
            if used_s - began > limit_s or idle.elapsed().ms > 1e3 * limit_s:
                raise TimeoutError
    return asked.result()


def _start(threads: int, parent: int) -> None:
    """Sets a process up; it ends with the one that asks it, however that ends."""
    die_with_parent(parent)
    torch.set_num_threads(threads)


def _started() -> None:
    """Does nothing; its end shows that a process has imported this module."""


class _Worker:
    """A process that compares networks, replaced when it dies."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ProcessPoolExecutor | None = None

    def row(
        self, network: str, img_size: int, timeout_s: float, kinds: Sequence[str]
    ) -> dict[str, Value]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _start, (self._threads, os.getpid())
            )
        try:
            self._pool.submit(_started).result()  # importing torch is not the network's time
            (pid,) = self._pool._processes
            return _result(self._pool.submit(compare, network, img_size, kinds), pid, timeout_s)
        except BrokenProcessPool:
            self.kill()
            return _failed(network, img_size, kinds, "crash", "the process died")
        except TimeoutError:
            self.kill()
            said = f"not done after {timeout_s:g} s of CPU time, or as long without any"
            return _failed(network, img_size, kinds, "timeout", said)
        except Exception as failure:  # eager itself cannot run it
            said = f"eager: {failure}"[:300]
            return _failed(network, img_size, kinds, "no_reference", said)

    def end(self) -> None:
        """Lets the process clean up after itself: a killed one leaves semaphores of tqdm's."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def kill(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(cancel_futures=True)


def _failed(
    network: str, img_size: int, kinds: Sequence[str], status: str, said: str
) -> dict[str, Value]:
    columns = {f"{kind}_{column}": text for kind in kinds
            for column, text in (("status", status), ("error", said))}  # fmt: skip
    return {"network": network, "img_size": img_size, **columns}
