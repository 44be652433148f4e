"""Measures one case of the scenario server in this process, in the order of measure_case.py: check,
serve, check again. No baseline takes turns with it: what a rate does to one backend says nothing of
another's.
"""

from collections.abc import Mapping
from typing import Any

from resfuse.bench.measuring import correctness, measure_case, network
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.failure import outcome_of
from resfuse.bench.measuring.inference import answers
from resfuse.bench.measuring.measure_case import Tell
from resfuse.bench.measuring.probes import peak_memory, roofline
from resfuse.bench.measuring.probes.idle import OtherWork, limit_s, wait_for_quiet
from resfuse.bench.measuring.served_network import ServedNetwork, round_seconds, torch_threads
from resfuse.bench.measuring.server_load import serve_at, serve_most
from resfuse.bench.models.model_builder import build
from resfuse.bench.models.weights_file import state_hash
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sample import Measured


def measure_server(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Tell
) -> tuple[Outcome, float]:
    """Measures a case as `measure_case.measure` does."""
    try:
        return _measure(case, options, ceilings, tell)
    except Exception as error:  # as there
        return outcome_of(error), 0.0


def measure_server_task(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """`measure_server` for a worker; what it returns goes through JSON."""
    return measure_case.run_job(measure_server, job, tell)


def _measure(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Tell
) -> tuple[Outcome, float]:
    device = measure_case.begin(case, options)
    cores = measure_case.share_cores(case)
    measure_case.rehearse(case, device, cores)
    model = build(case.model, options.seed, case.weights)
    weights_sha256 = state_hash(model)
    model, batches = network.prepared(model, case, options.seed), network.batches(case)
    compute = network.compute(case)
    before = peak_memory.held(device)
    served = measure_case.subject(
        case, case.backend, case.memory_format, model, batches, cores, compute=compute
    )
    assert isinstance(served, ServedNetwork)
    watch = timing.Watch()
    served.set_up()
    setup_s = timing.seconds(watch.elapsed())
    peak = measure_case.peak_of(served, device, before)
    with torch_threads(cores):
        served.expect(answers(model, batches, case.math_mode, compute))
    checks = [served.check(i, "before timing") for i in range(network.TIMED_BATCHES)]

    quiet = wait_for_quiet(limit_s(device))
    others = OtherWork()
    tell("timing")
    watch = timing.Watch()
    seed, seconds = options.seed, options.seconds
    if case.qps:
        found = serve_at(served, case.qps, seconds, seed)
    else:
        found = serve_most(served, case.latency_bound_ms, seconds, seed, options.timeout_s)
    span = watch.elapsed()
    tell("timed")
    span_s = timing.seconds(span)
    other_load = others.cores(span_s)
    served.settle_round(round_seconds(seconds))
    measure_case.require_no_memory(served, device)
    checks.append(served.check(network.TIMED_BATCHES, "after timing, on a new batch"))

    cost = measure_case.cost_of(case, model)
    element_bytes = network.element_bytes(case)
    floor = roofline.floor(
        cost, case.batch_size, case.mode, element_bytes, ceilings, case.math_mode
    )
    measured = Measured(
        case=case,
        param_count=cost.param_count,
        macs=cost.macs,
        activations=cost.activations,
        times_ms=(),
        baseline_ms=(),
        ended_by="",
        phases_ms={},
        accuracy=correctness.worst(checks),
        memory=peak,
        setup_s=setup_s,
        baseline_setup_s=0.0,
        floor_ms=floor.ms if floor else None,
        joules=None,
        sm_clock_mhz=None,
        throttle=None if quiet else "other processes",
        other_load=other_load,
        step=served.step_once,
        weights_sha256=weights_sha256,
        streams=served.count,
        latencies_ms=found.latencies_ms,
        qps=found.qps,
        answered_per_s=found.answered_per_s,
        arrival_seed=seed,
    )
    return measure_case.conclude(measured, floor), span_s
