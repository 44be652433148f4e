"""What a command must know of this machine before it measures, from a process that is gone before
the first case starts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.device import resolve_device
from resfuse.bench.models.source import shape_text
from resfuse.bench.records.case import Case, Request
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.subprocess_runner import run_task

if TYPE_CHECKING:
    import torch

SURVEY_TIMEOUT_S = 300.0
ROUNDS_VARIABLE = "RESFUSE_SURVEY_ROUNDS"
TASK = "resfuse.bench.running.survey:take_survey"


def survey(
    request: Request,
    threads: int,
    ceilings: bool,
    limit_s: float = SURVEY_TIMEOUT_S,
    known: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Device, environment, commit, ceilings, and why backends cannot run here, from a process that
    is gone before the first case starts.

    Args:
        request: whose precisions' ceilings are measured, and whose backends are asked.
        known: facts and ceilings of environments; what this device has reached in one of them is
            not measured again.

    Raises:
        UsageError: the device, weights or images cannot be used.
        RuntimeError: the process died.
    """
    payload = {
        "request": asdict(request),
        "threads": threads,
        "ceilings": ceilings,
        "known": [dict(facts) for facts in known],
    }
    result = run_task(TASK, payload, limit_s)
    if isinstance(result, Outcome):
        raise RuntimeError(f"the survey of this machine failed: {result.error}")
    return result


def take_survey(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Finds out what a sweep must know before it starts; runs in the subprocess.

    Also reads the user's weights, images and environment once: what is bad is found now, not in
    the middle.
    """
    import torch

    from resfuse.bench.measuring import photographs
    from resfuse.bench.measuring.clock.timing import Watch
    from resfuse.bench.measuring.probes import idle, machine, noise
    from resfuse.bench.running import sweep
    from resfuse.bench.running.world import require_devices, world_of

    request = Request(**job["request"])
    request = replace(request, device=resolve_device(request.device))
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    cases = sweep.expand(request)
    if request.parallel:
        world = world_of(os.environ)
        require_devices(request.device, world.local_size)
    photographs.batch(request.images, 1, 32, 0)
    idle.limit_s("cpu")
    rounds = rounds_of(os.environ, machine.ROUNDS)
    gmacs = _try_models(cases)
    facts = machine.facts(request.device, job["threads"])
    env_id = machine.env_id(facts)
    precisions = sorted({case.precision for case in cases})
    known = machine.known_ceilings(facts, job.get("known", []))
    device = torch.device(request.device)
    backends = dict.fromkeys(case.backend for case in cases)
    reasons = {name: _reason(name, device) for name in backends}
    ceilings, conditions = {}, {}
    if job["ceilings"]:
        others, watch = idle.OtherWork(), Watch()
        ceilings = machine.ceilings(request.device, precisions, known, rounds)
        interval = noise.expected_interval(request.device, min(noise.ROUNDS, 2 * rounds))
        elapsed_s = watch.elapsed().ms / 1e3
        conditions = {
            "other_load": others.cores(elapsed_s),
            "busy_with": others.busiest(elapsed_s),
            "interval": interval,
        }
    return {
        "device": request.device,
        "facts": facts,
        "env_id": env_id,
        "folder": machine.folder_name(facts),
        "commit": machine.commit(),
        "ceilings": ceilings,
        **conditions,
        "gmacs": gmacs,
        "unavailable": {name: reason for name, reason in reasons.items() if reason is not None},
    }


def rounds_of(environment: Mapping[str, str], usual: int) -> int:
    """Returns how often the survey runs each of its loops: $RESFUSE_SURVEY_ROUNDS, or the usual
    number. With 3 instead of 12 it takes 3 s less; ceilings are then lower at most, so that no
    impossible time passes for it.

    Raises:
        UsageError: the variable is no whole number from 2.
    """
    own = environment.get(ROUNDS_VARIABLE, str(usual))
    if not own.isdecimal() or int(own) < 2:
        raise UsageError(
            f"environment variable {ROUNDS_VARIABLE}: '{own}'; accepted: whole numbers from 2"
        )
    return int(own)


def _reason(backend: str, device: "torch.device") -> str | None:
    """Returns why a backend cannot run here, as far as that is known without a case. One that fails
    to answer is asked again by its case, which has a row to say it in."""
    from resfuse.bench.backends import why_unavailable

    try:
        return why_unavailable(backend, device)
    except Exception:
        return None


def _try_models(cases: Sequence[Case]) -> dict[str, float]:
    """Builds what may be the user's mistake: functions, programs, arguments and weights.

    Returns:
        the GMACs of those that had to run, by name.

    Raises:
        UsageError: one cannot be built, cannot be filled with the weights, or does not take images
            of the shape it is to be measured at.
    """
    import torch

    from resfuse.bench.measuring.probes.roofline import cost_of_run
    from resfuse.bench.models.model_builder import OWN, SEEDED, batch_size, build
    from resfuse.bench.models.source import first_line
    from resfuse.bench.models.sources import parsed

    gmacs = {}
    for case in {(case.model, case.weights): case for case in cases}.values():
        source, _, given = parsed(case.model)
        if case.weights == SEEDED and not given.kwargs:
            continue
        model = build(case.model, weights=case.weights)
        if source.weights != OWN:
            continue
        parameter = next(model.parameters(), torch.empty(0))
        images = torch.zeros(batch_size(case.model) or 1, *case.input_shape, dtype=parameter.dtype)
        try:
            gmacs[case.model] = cost_of_run(model, images).macs / 1e9
        except Exception as error:
            shape = shape_text(*case.input_shape)
            raise UsageError(
                f"argument --input-shape: {case.model} does not run on an image of {shape}: "
                f"{first_line(error)}"
            ) from error
    return gmacs
