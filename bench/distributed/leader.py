"""`torchrun ... -m resfuse.bench bench --bench train`: lead the other processes, or follow."""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.distributed import Store

from resfuse.bench.common import json_file
from resfuse.bench.common.errors import UsageError
from resfuse.bench.distributed.store import appears, connect
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome, outcome_from
from resfuse.bench.running.session import bench_request
from resfuse.bench.running.subprocess_runner import run_case
from resfuse.bench.running.world import World, world_of

DEVICES = ("auto", "cpu", "cuda")
PATIENCE_S = 30.0  # over a case's own time limit, for starting and ending its process
# What a row says of several failures: the first of these that one of them has.
GRAVITY = ("oom", "fail_accuracy", "unavailable", "fail_to_run", "timeout")
MEASURE = "resfuse.bench.distributed.measure_together:together_task"
ENDED = "ended because another process failed"


def bench(args: argparse.Namespace) -> int:
    """Runs the whole command in one of torchrun's processes and returns its exit code.

    Raises:
        UsageError: bad input, found by the process that leads; the others end with its exit code.
    """
    world = world_of(os.environ)
    if not world.leads:
        return _follow(world)
    store, leader = connect(world, host=True), None
    code = 2  # of bad input; whatever else goes wrong here ends this process, and torchrun the rest
    try:
        leader = Leader(world, store)
        _complete(args, world)
        code = bench_request(args, leader.measure)
        return code
    finally:
        if leader is not None:
            leader.end(code)


def _complete(args: argparse.Namespace, world: World) -> None:
    if args.bench != ["train"]:
        raise UsageError(
            f"argument --bench: '{','.join(args.bench)}'; accepted on several processes: train"
        )
    if args.device not in DEVICES:
        raise UsageError(
            f"argument --device: '{args.device}'; accepted on several processes: "
            f"{', '.join(DEVICES)}, since each process takes a device of its own"
        )
    args.parallel, args.world_size = args.parallel or "ddp", world.size
    # torchrun itself leaves each process one thread.
    args.threads = args.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)


class Leader:
    """Tells the other processes what to measure, and combines the outcomes of all."""

    def __init__(self, world: World, store: Store) -> None:
        self._world, self._store = world, store
        self._sent = 0

    def measure(self, case: Case, options: Options, ceilings: dict[str, float]) -> Outcome:
        """Measures a case on all processes, in place of `subprocess_runner.run_case`."""
        key = self._tell({"case": asdict(case), "options": asdict(options), "ceilings": ceilings})
        outcomes = {0: _run(self._store, key, 0, case, options, ceilings)}
        for rank in range(1, self._world.size):
            outcomes[rank] = self._answer(key, rank, options.timeout_s + PATIENCE_S)
        return combine(outcomes)

    def end(self, code: int) -> None:
        self._tell({"end": code})

    def _tell(self, message: Mapping[str, Any]) -> str:
        key, self._sent = f"told/{self._sent}", self._sent + 1
        self._store.set(key, json.dumps(message))
        return key

    def _answer(self, key: str, rank: int, limit_s: float) -> Outcome:
        name = f"{key}/ended/{rank}"
        if not appears(self._store, name, limit_s):
            return Outcome("timeout", f"no answer within {limit_s:g} s")
        try:
            return outcome_from(json_file.parse(self._store.get(name)))
        except ValueError as error:
            return Outcome("fail_to_run", f"it answered with {error}")


def _follow(world: World) -> int:
    store, received = connect(world), 0
    while True:
        key = f"told/{received}"
        appears(store, key)  # a leader that is gone takes the store or, by torchrun, this process
        try:
            message = json_file.parse(store.get(key))
            if "end" in message:
                return int(message["end"])
            case, options = Case(**message["case"]), Options(**message["options"])
            ceilings = {str(name): float(rate) for name, rate in message["ceilings"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"the process that leads sent no case: {error}") from None
        outcome = _run(store, key, world.rank, case, options, ceilings)
        store.set(f"{key}/ended/{world.rank}", json.dumps(asdict(outcome)))
        received += 1


def _run(
    store: Store,
    key: str,
    rank: int,
    case: Case,
    options: Options,
    ceilings: dict[str, float],
) -> Outcome:
    """Measures this process's part of a case; its failure ends the others'
    (measure_together.py)."""
    try:
        outcome = run_case(case, options, ceilings, task=MEASURE, key=key)
    except UsageError as error:
        outcome = Outcome("fail_to_run", str(error))
    if outcome.status != "pass":
        store.set(f"{key}/failed", str(rank))
    return outcome


def combine(outcomes: Mapping[int, Outcome]) -> Outcome:
    """Returns the outcome of a case: the first process's if all passed, otherwise all failures.

    Args:
        outcomes: rank -> its outcome.
    """
    failed = {rank: one for rank, one in outcomes.items() if one.status != "pass"}
    causes = {rank: one for rank, one in failed.items() if one.error != ENDED} or failed
    if not causes:
        return outcomes[0]
    said: dict[str, list[int]] = {}
    for rank, one in causes.items():
        said.setdefault(one.error, []).append(rank)
    status = min((one.status for one in causes.values()), key=GRAVITY.index)
    sentences = [f"process {', '.join(map(str, ranks))}: {error}" for error, ranks in said.items()]
    return Outcome(status, "; ".join(sentences))
