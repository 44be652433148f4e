"""What an engine of a network is like on a device: its plan, build time, memory, error and speed.

Weights, inputs, check and clock are the harness's own, as for a case of a sweep: the answer is
compared with fp64 before timing, in every timed round, and afterwards on an unseen batch.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from resfuse.bench.backends.engine import PRECISIONS
from resfuse.bench.common.statistics import paired_speedup
from resfuse.bench.measuring import correctness, network
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.inference import Answers, Checked, Inference, answers
from resfuse.bench.measuring.measure_case import synchronize
from resfuse.bench.measuring.probes.idle import limit_s, wait_for_quiet
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.sample import Accuracy
from resfuse.kernels import Engine, build_engine

FORMAT = "channels_last"  # of the images, for the engine and for eager beside it
MB = 2**20


@dataclass(frozen=True)
class Speed:
    """Medians of the timed rounds, in turns with eager; the interval is of 95 %."""

    p50_ms: float
    eager_p50_ms: float
    rounds: int
    speedup: float
    speedup_ci_low: float
    speedup_ci_high: float
    quiet: bool  # nothing else ran on the machine


@dataclass(frozen=True)
class EngineFacts:
    """An engine at one batch size; `speed` is None where its answers are wrong."""

    batch_size: int
    explain: str
    arena_mb: float
    least_mb: float  # the largest sum of values alive at one moment
    weights_mb: float
    graphs_mb: float  # CUDA graphs of all batch sizes: their pool, and the inputs' buffers
    eager_err: float  # relative L2 against fp64, worst image, as the next two
    allowed_err: float
    rel_l2_err: float | None
    max_abs_err: float | None
    speed: Speed | None
    error: str = ""  # what is wrong, in a sentence


def build(
    model: nn.Module, case: Case, batch_sizes: Sequence[int], timings: Path | None
) -> tuple[Engine, float]:
    """An engine for the case's images at each batch size, and the seconds it took."""
    example = network.batches(case)[0]
    watch = timing.Watch()
    engine = build_engine(
        model, example, batch_sizes=batch_sizes, timings=timings,
        precision=PRECISIONS[network.compute_dtype(case)],
    )  # fmt: skip
    synchronize(example.device.type)
    return engine, timing.seconds(watch.elapsed())


def facts(engine: Engine, model: nn.Module, case: Case, options: Options) -> EngineFacts:
    """Checks and times an engine at the case's batch size.

    Args:
        engine: of `model`, which stays as it is.
        case: precision, device, batch and image size.
        options: seconds and rounds of the timing.

    Raises:
        ValueError: the engine does not take such images.
    """
    batches = network.batches(case)
    expected = answers(model, batches, case.math_mode, network.compute(case))
    found: list[Accuracy] = []
    speed, error = None, ""
    try:
        speed = _speed(engine, model, batches, expected, case, options, found.append)
    except correctness.WrongAnswer as wrong:
        error = str(wrong)
        found += [wrong.accuracy] if wrong.accuracy else []
    held = engine.memory(case.batch_size)
    eager = zip(expected.eager, expected.reference, strict=True)
    accuracy = correctness.worst(found) if found else None
    return EngineFacts(
        batch_size=case.batch_size,
        explain=engine.explain(case.batch_size),
        arena_mb=held.arena_bytes / MB,
        least_mb=held.least_arena_bytes / MB,
        weights_mb=held.weights_bytes / MB,
        graphs_mb=(held.graph_pool_bytes + held.graph_inputs_bytes) / MB,
        eager_err=max(e for y, ref in eager for e in correctness.relative_errors(y, ref)),
        allowed_err=max(expected.limit.each),
        rel_l2_err=accuracy.rel_l2 if accuracy else None,
        max_abs_err=accuracy.max_abs if accuracy else None,
        speed=speed,
        error=error,
    )


def _speed(
    engine: Engine,
    model: nn.Module,
    batches: Sequence[Tensor],
    expected: Answers,
    case: Case,
    options: Options,
    saw: Callable[[Accuracy], None],
) -> Speed:
    candidate = Checked(lambda _: engine, FORMAT, batches)
    eager = Inference("eager", FORMAT, deepcopy(model), batches, network.compute(case))
    for subject in (candidate, eager):
        subject.set_up()
        subject.expect(expected)
    for batch in range(network.TIMED_BATCHES):
        saw(candidate.check(batch, "before timing"))
    kind = torch.device(case.device).type
    quiet = wait_for_quiet(limit_s(kind))
    laps, _ = timing.interleave(
        [candidate.timed(), eager.timed()],
        kind,
        options.seconds,
        options.min_rounds,
        options.max_rounds,
    )
    saw(candidate.check(network.TIMED_BATCHES, "after timing, on a new batch"))
    ours, theirs = ([sum(lap) for lap in of_one] for of_one in laps)
    speedup = paired_speedup(theirs, ours)
    return Speed(median(ours), median(theirs), len(ours), *speedup, quiet)
