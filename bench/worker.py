"""The subprocess that does the work: `python -m resfuse.bench.worker FD`, a job as JSON on stdin,
messages to FD.

Each message is a JSON object on a line: {"event": "timing"}, {"event": "timed"}, {"event":
"news", ...} where a job has something to tell on the way, then {"event":
"result", ...} or {"event": "usage", "message": ...}. stdout and stderr are free for whatever the
backends print.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resfuse.bench.case import Case, Options, Request
from resfuse.bench.errors import UsageError

if TYPE_CHECKING:
    import torch

PR_SET_PDEATHSIG = 1


def main() -> None:
    descriptor = int(sys.argv[1])
    die_with_parent()
    ignore_notices()
    job = json.load(sys.stdin)

    def tell(event: str, **content: Any) -> None:
        os.write(descriptor, json.dumps({"event": event, **content}).encode() + b"\n")

    try:
        tell("result", **TASKS[job["task"]](job, tell))
    except UsageError as error:
        tell("usage", message=str(error))


def _survey(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """What a sweep must know before it starts.

    Also reads the user's weights, images and environment once: what is bad is found now, not in
    the middle.
    """
    import torch

    from resfuse.bench import inputs, machine, quiet, sweep
    from resfuse.bench.distributed.world import require_devices, world_of
    from resfuse.bench.doctor.noise import expected_interval
    from resfuse.bench.timing import Watch

    request = Request(**job["request"])
    request = replace(request, device=resolve_device(request.device))
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    cases = sweep.expand(request)
    if request.parallel:
        world = world_of(os.environ)
        require_devices(request.device, world.local_size)
    inputs.batch(request.images, 1, 32, 0)
    quiet.limit_s("cpu")
    _try_weights(request.weights, {case.model for case in cases})
    facts = machine.facts(request.device, job["threads"])
    env_id = machine.env_id(facts)
    precisions = sorted({case.precision for case in cases})
    known = machine.known_ceilings(facts, job.get("known", []))
    device = torch.device(request.device)
    backends = dict.fromkeys(case.backend for case in cases)
    reasons = {name: _reason(name, device) for name in backends}
    ceilings, conditions = {}, {}
    if job["ceilings"]:
        others, watch = quiet.OtherWork(), Watch()
        ceilings = machine.ceilings(request.device, precisions, known)
        interval = expected_interval(request.device)
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
        "unavailable": {name: reason for name, reason in reasons.items() if reason is not None},
    }


def _reason(backend: str, device: "torch.device") -> str | None:
    """Why a backend cannot run here, as far as that is known without a case. One that fails to
    answer is asked again by its case, which has a row to say it in."""
    from resfuse.bench.backends import why_unavailable

    try:
        return why_unavailable(backend, device)
    except Exception:
        return None


def _try_weights(weights: str, models: set[str]) -> None:
    from resfuse.resnet_ref import create, load_pretrained, load_weights

    if weights == "seeded":
        return
    for name in sorted(models):
        model = create(name)
        try:
            if weights == "pretrained":
                load_pretrained(name, model)
            else:
                load_weights(model, Path(weights))
        except (ValueError, RuntimeError, OSError) as error:
            flag = "--pretrained" if weights == "pretrained" else "--weights"
            raise UsageError(f"argument {flag}: {name}: {error}") from None


def _measure(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    from resfuse.bench.backends import BACKENDS, Backend

    for name, build in job["backends"].items():
        BACKENDS[name] = Backend(build, "a study's own")
    case, options = Case(**job["case"]), Options(**job["options"])
    if job["together"]:
        from resfuse.bench.distributed.measure import measure_together

        outcome, span_s = measure_together(case, options, job["ceilings"], tell, job["together"])
    else:
        from resfuse.bench.measure import measure

        outcome, span_s = measure(case, options, job["ceilings"], tell)
    return {"outcome": asdict(outcome), "span_s": span_s}


def _convolution(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    from resfuse.bench.kernels.convolutions import Convolution
    from resfuse.bench.kernels.measure import measure

    convolution = Convolution.from_plain(job["convolution"])
    options = Options(**job["options"])
    outcomes, span_s = measure(convolution, job["providers"], options, job["ceilings"], tell)
    told = {name: asdict(outcome) for name, outcome in outcomes.items()}
    return {"outcomes": told, "span_s": span_s}


def _trials(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    if job["device"].split(":")[0] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when kernels are first imported
    from resfuse.bench.kernels.judge import run_trials

    skip = set(job["skip"])
    run_trials(job["kernels"], job["modes"], job["device"], skip, lambda **c: tell("news", **c))
    return {}


def _probe(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    if job["device"].split(":")[0] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from resfuse.bench.gpu_plan.probe import ask

    ask(job["device"], set(job["skip"]), lambda **content: tell("news", **content))
    return {}


def _training(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    import torch

    from resfuse.bench.studies.learning import data, recipe, row, run

    torch.set_num_threads(1)
    one = run.Run(**job["run"])
    loaded = data.load(job["source"])
    done = recipe.train(one, loaded, job["device"], lambda share: tell("news", share=share))
    return {"metrics": row.metrics(done, loaded)}


TASKS = {
    "survey": _survey,
    "measure": _measure,
    "convolution": _convolution,
    "trials": _trials,
    "probe": _probe,
    "training": _training,
}


def resolve_device(asked: str) -> str:
    """The device to run on; "auto" is the GPU where there is one.

    Raises:
        UsageError: torch cannot use the device that was asked for.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError) as error:
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"argument --device: '{asked}' cannot be used: {reason}; accepted here: {here}"
        ) from None
    if torch.device(asked).type not in ("cpu", "cuda"):
        raise UsageError(f"argument --device: '{asked}'; accepted: cpu, cuda, cuda:N")
    return asked


def ignore_notices() -> None:
    """A cluster tells all processes of a job that its time is up; what follows is the parent's
    business, and a worker that died of it would leave a row that says so."""
    for notice in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(notice, signal.SIG_IGN)


def die_with_parent() -> None:
    """A killed harness leaves no process behind that slows down the next one (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
