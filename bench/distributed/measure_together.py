"""One process's part in measuring a training step of several: what its subprocess does.

The order: the peak of memory; the first process by itself while the others rest (weak scaling is
measured against that); then all together. There, steps of the candidate, of the baseline and of
every process for itself take turns; the difference between the first and the last is the
communication that the backward pass does not hide. How many rounds there are is agreed upon before,
and what a single process decides by its own clock (energy) is left out.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from resfuse.bench.backends import load_trainable
from resfuse.bench.distributed.leader import ENDED
from resfuse.bench.distributed.parallel_step import ParallelTraining, started_together
from resfuse.bench.distributed.store import appears, connect
from resfuse.bench.measuring import correctness, measure_case, network
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.failure import blame, blamed, outcome_of
from resfuse.bench.measuring.probes import nvml, peak_memory, roofline
from resfuse.bench.measuring.probes.idle import limit_s, wait_for_quiet
from resfuse.bench.measuring.training_step import Training
from resfuse.bench.models.model_builder import build
from resfuse.bench.models.weights_file import state_hash
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sample import Measured
from resfuse.bench.running.world import World, world_of

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
STEPS_A_ROUND = 3


def measure_together(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Any, key: str
) -> tuple[Outcome, float]:
    """Measures one case and returns this process's outcome, as `measure_case.measure` does.

    Args:
        tell: sends a message to the parent process.
        key: what the store calls this case; `<key>/failed` appears where a process has failed,
            and ends this one wherever it waits for the others.
    """
    world = world_of(os.environ)
    try:
        store = connect(world)
        _end_with_others(world, key, tell)
        kind = torch.device(case.device).type
        measure_case.require_device(kind)
        if kind == "cuda":
            torch.cuda.set_device(world.local_rank)
        load_trainable(case.backend)  # where there is none, all processes say so by themselves
        dist.init_process_group(
            BACKENDS[kind],
            store=dist.PrefixStore(f"{key}/group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=options.timeout_s),
        )
        result = _measure(case, options, ceilings, tell, world)
        dist.destroy_process_group()
        return result
    except Exception as error:  # as in measure.measure
        return outcome_of(error), 0.0


def together_task(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Runs `measure_together` in a worker, and returns its results as JSON can carry them."""
    case, options = Case(**job["case"]), Options(**job["options"])
    outcome, span_s = measure_together(case, options, job["ceilings"], tell, job["key"])
    return {"outcome": asdict(outcome), "span_s": span_s}


def _end_with_others(world: World, key: str, tell: Any) -> None:
    store = connect(world)  # its own: a connection serves one thread at a time

    def watch() -> None:
        appears(store, f"{key}/failed")
        tell("result", outcome=asdict(Outcome("fail_to_run", ENDED)), span_s=0.0)
        os._exit(0)  # the main thread may be deep in a collective that will never end

    threading.Thread(target=watch, daemon=True).start()


def _measure(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Any, world: World
) -> tuple[Outcome, float]:
    device = measure_case.begin(case, options)
    measure_case.rehearse(case, device)
    model = build(case.model, options.seed, case.weights)
    weights_sha256 = state_hash(model)
    model, batches = (
        network.prepared(model, case, options.seed),
        network.batches(case, world.rank),
    )

    def subject(kind: type[Training], backend: str, memory_format: str) -> Training:
        built = measure_case.subject(case, backend, memory_format, model, batches, training=kind)
        assert isinstance(built, Training)
        return built

    dist.barrier()
    before = peak_memory.held(device)
    candidate = subject(ParallelTraining, case.backend, case.memory_format)
    watch = timing.Watch()
    candidate.set_up()
    measure_case.synchronize(device)
    setup_s = timing.seconds(watch.elapsed())
    peak = measure_case.peak_of(candidate, device, before)
    alone_ms, rounds, quiet = _alone(
        subject(Training, case.backend, case.memory_format), device, options, world
    )
    baseline = subject(ParallelTraining, case.baseline, case.baseline_memory_format)
    apart = subject(Training, case.backend, case.memory_format)
    watch = timing.Watch()
    baseline.set_up()
    measure_case.synchronize(device)
    baseline_setup_s = timing.seconds(watch.elapsed())
    apart.set_up()
    checks = [candidate.check(i, "before timing") for i in range(network.TIMED_BATCHES)]
    with blame(case.baseline):
        baseline.check(0, "before timing")

    tell("timing")
    steps = [
        candidate.timed(),
        blamed(baseline.timed(), case.baseline),
        started_together(apart.timed()),
    ]
    laps, span = timing.interleave(steps, device, options.seconds, rounds, rounds)
    tell("timed")
    span_s = timing.seconds(span)
    clock, throttle = nvml.clock_and_throttle(device, quiet)
    checks.append(candidate.check(network.TIMED_BATCHES, "after timing, on a new batch"))

    cost = measure_case.cost_of(case, model)
    floor = roofline.floor(
        cost, case.batch_size, case.mode, network.element_bytes(case), ceilings, case.math_mode
    )
    times_ms, baseline_ms, apart_ms = (tuple(sum(lap) for lap in own) for own in laps)
    measured = Measured(
        case=case,
        param_count=cost.param_count,
        macs=cost.macs,
        activations=cost.activations,
        times_ms=times_ms,
        baseline_ms=baseline_ms,
        ended_by="rounds",
        phases_ms=measure_case.phases(candidate, laps[0]),
        accuracy=correctness.worst(checks),
        memory=peak,
        setup_s=setup_s,
        baseline_setup_s=baseline_setup_s,
        floor_ms=floor.ms if floor else None,
        joules=None,
        sm_clock_mhz=clock,
        throttle=throttle,
        other_load=None,  # to each process the others of the group are other work
        step=candidate.step_once,
        alone_ms=alone_ms,
        apart_ms=apart_ms,
        weights_sha256=weights_sha256,
    )
    return measure_case.conclude(measured, floor), span_s


def _alone(
    training: Training, device: str, options: Options, world: World
) -> tuple[tuple[float, ...], int, bool]:
    """Times a step of the first process while the others wait without computing.

    Returns:
        its times in ms, on all processes; how many rounds the budget then allows with all at work;
        whether the machine was at rest.
    """
    shared: list[Any] = [None]
    if world.leads:
        training.set_up()
        quiet = wait_for_quiet(limit_s(device))
        share_s = options.seconds / (STEPS_A_ROUND + 1)
        laps, _ = timing.interleave(
            [training.timed()], device, share_s, options.min_rounds, options.max_rounds
        )
        times_ms = tuple(sum(lap) for lap in laps[0])
        fitting = round(STEPS_A_ROUND * share_s * 1e3 / (STEPS_A_ROUND * median(times_ms)))
        rounds = max(options.min_rounds, min(options.max_rounds, fitting))
        shared = [(times_ms, rounds, quiet)]
    # gloo's processes sleep while they wait for the first; NCCL's keep a GPU of their own busy.
    dist.broadcast_object_list(shared, src=0)
    found: tuple[tuple[float, ...], int, bool] = shared[0]
    return found
