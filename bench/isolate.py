"""One subprocess a case: a backend that crashes, hangs or runs out of memory costs its own row and
nothing else.

The parent also holds a watch of its own, out of the backend's reach: the timed rounds must take as
long here as the subprocess says they did.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import inf
from typing import IO, TYPE_CHECKING, Any

from resfuse.bench import allocator, json_file
from resfuse.bench.case import Case, Options, Request
from resfuse.bench.errors import UsageError
from resfuse.bench.row import Outcome, outcome_from
from resfuse.bench.timing import Watch, seconds

if TYPE_CHECKING:
    from resfuse.bench.kernels.convolutions import Convolution
    from resfuse.bench.studies.learning.run import Run

SURVEY_TIMEOUT_S = 300.0
TRIAL_TIMEOUT_S = 60.0  # of one configuration, compilation included
GRACE_S = 5.0
# The parent shares two cores with the work it watches, and wakes late at times.
WATCH_SLACK_S, WATCH_SLACK = 0.5, 0.1
EVENTS = ("timing", "timed", "news", "usage", "result")
# Something in the subprocess writes to every descriptor that is open.
NO_SENSE = Outcome("fail_to_run", "the subprocess sent something that is no message of ours")


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
    job = {
        "task": "survey",
        "request": asdict(request),
        "threads": threads,
        "ceilings": ceilings,
        "known": [dict(facts) for facts in known],
    }
    result = _converse(job, limit_s)
    if isinstance(result, Outcome):
        raise RuntimeError(f"the survey of this machine failed: {result.error}")
    return result


def run_case(
    case: Case,
    options: Options,
    ceilings: dict[str, float],
    together: str = "",
    backends: Mapping[str, str] | None = None,
) -> Outcome:
    """Measures a case in a subprocess of its own, within the time limit.

    Args:
        together: what the processes that share a case call it, see bench/distributed.
        backends: name -> "module:function" that the case may name beside BACKENDS; for studies.

    Raises:
        UsageError: the subprocess found the user's input at fault.
        KeyboardInterrupt: after the subprocess was killed.
    """
    job = {
        "task": "measure",
        "case": asdict(case),
        "options": asdict(options),
        "ceilings": ceilings,
        "backends": dict(backends or {}),
        "together": together,
    }
    result = _converse(job, options.timeout_s)
    if isinstance(result, Outcome):
        return result
    try:
        outcome, span_s = outcome_from(result["outcome"]), float(result["span_s"])
    except (ValueError, KeyError, TypeError):
        return NO_SENSE
    return compare_watches(outcome, span_s, result["watched_s"])


def run_convolution(
    convolution: "Convolution",
    providers: Sequence[str],
    options: Options,
    ceilings: Mapping[str, float],
) -> dict[str, Outcome]:
    """Measures providers on one convolution, in turns in one subprocess, within the time limit.

    Returns:
        provider -> outcome; the same one for all where the subprocess did not come to an end.

    Raises:
        KeyboardInterrupt: after the subprocess was killed.
    """
    job = {
        "task": "convolution",
        "convolution": asdict(convolution),
        "providers": list(providers),
        "options": asdict(options),
        "ceilings": dict(ceilings),
    }
    result = _converse(job, options.timeout_s)
    if isinstance(result, Outcome):
        return dict.fromkeys(providers, result)
    try:
        span_s, told = float(result["span_s"]), result["outcomes"]
        outcomes = {name: outcome_from(told[name]) for name in providers}
    except (ValueError, KeyError, TypeError):
        return dict.fromkeys(providers, NO_SENSE)
    watched_s = result["watched_s"]
    return {name: compare_watches(one, span_s, watched_s) for name, one in outcomes.items()}


def run_trials(
    kernels: Sequence[str],
    modes: Sequence[str],
    device: str,
    skip: Sequence[str],
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None],
) -> Outcome | None:
    """Checks configurations of kernels in a subprocess, which may leave off before the last, and
    may be silent for TRIAL_TIMEOUT_S.

    Args:
        skip: keys (kernels.judge.key) of those not to be tried.
        heard: told {"began": key} and {"key": ..., ...} as it happens, see kernels.judge.

    Returns:
        how the subprocess died, or None where it came to its end.

    Raises:
        KeyboardInterrupt: after the subprocess was killed.
    """
    job = {
        "task": "trials",
        "kernels": list(kernels),
        "modes": list(modes),
        "device": device,
        "skip": list(skip),
    }
    result = _converse(job, timeout_s, heard, TRIAL_TIMEOUT_S)
    return result if isinstance(result, Outcome) else None


def run_probe(
    device: str,
    skip: Sequence[str],
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None],
) -> Outcome | None:
    """Asks the open questions about a GPU in a subprocess (gpu_plan/probe.py).

    Args:
        skip: names of questions not to be asked.
        heard: told {"began": name} and {"name": name, "answer": ...} as it happens.

    Returns:
        how the subprocess died, or None where it came to its end.
    """
    job = {"task": "probe", "device": device, "skip": list(skip)}
    result = _converse(job, timeout_s, heard)
    return result if isinstance(result, Outcome) else None


def run_training(
    run: "Run",
    source: str,
    device: str,
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None],
) -> Outcome:
    """Trains a network on one CPU thread (or on a GPU) in a subprocess, within the time limit.

    Args:
        source: as studies.learning.data.load takes it.
        heard: told {"share": 0 to 1} some times an epoch; what it raises ends the training.
    """
    job = {"task": "training", "run": asdict(run), "source": source, "device": device}
    result = _converse(job, timeout_s, heard)
    return result if isinstance(result, Outcome) else Outcome("pass", "", result["metrics"])


def compare_watches(outcome: Outcome, claimed_s: float, seen_s: float) -> Outcome:
    """Fails a passed case whose own clocks disagree with the parent's watch.

    Args:
        outcome: as the subprocess sent it.
        claimed_s: length of the timed rounds by the clocks of the subprocess.
        seen_s: the same by the parent's.
    """
    if outcome.status != "pass" or abs(seen_s - claimed_s) <= WATCH_SLACK_S + WATCH_SLACK * seen_s:
        return outcome
    message = (
        f"the timed rounds took {seen_s:.2f} s, but {claimed_s:.2f} s by the case's own clocks"
    )
    return Outcome("fail_to_run", message)


def _ignore(message: dict[str, Any]) -> None:
    pass


def _converse(
    job: dict[str, Any],
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None] = _ignore,
    silence_s: float = inf,
) -> dict[str, Any] | Outcome:
    """Sends the job, waits for the result; an Outcome where there is none.

    Args:
        heard: gets what is told on the way.
        silence_s: the longest time between two messages.
    """
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "resfuse.bench.worker", str(write)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[write], start_new_session=True,
            env=allocator.keeping(os.environ),
        )  # fmt: skip
        os.close(write)
        grace_s = GRACE_S  # for a process that is done, or dying on its own
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
            result = _listen(read, timeout_s, heard, silence_s)
        except BrokenPipeError:
            result = None
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            grace_s = 0.0
            return NO_SENSE
        except TimeoutError:
            grace_s = 0.0
            return Outcome("timeout", f"not done after {timeout_s:g} s")
        except (KeyboardInterrupt, SystemExit):  # the latter: a cluster's job was preempted
            grace_s = 0.0
            raise
        finally:
            os.close(read)
            _end(process, grace_s)
        return result if result is not None else _how_it_died(process.returncode, log)


def _listen(
    read: int, timeout_s: float, heard: Callable[[dict[str, Any]], None], silence_s: float
) -> dict[str, Any] | None:
    """The result message with `watched_s` added; None where the process ended without one.

    Raises:
        ValueError: what came is no message.
    """
    watch = Watch()
    pending, began, watched_s, last = b"", 0.0, 0.0, 0.0
    while True:
        now = seconds(watch.elapsed())
        left = min(timeout_s - now, silence_s - (now - last))
        if left <= 0 or not select.select([read], [], [], left)[0]:
            raise TimeoutError
        received = os.read(read, 65536)
        if not received:
            return None
        last = seconds(watch.elapsed())
        *lines, pending = (pending + received).split(b"\n")
        if len(pending) > json_file.MOST_BYTES:
            raise ValueError("a message without an end")
        for line in lines:
            message = json_file.parse(line)
            if not isinstance(message, dict) or message.get("event") not in EVENTS:
                raise ValueError("no message")
            event = message.pop("event")
            if event == "timing":
                began = seconds(watch.elapsed())
            elif event == "timed":
                watched_s = seconds(watch.elapsed()) - began
            elif event == "news":
                heard(message)
            elif event == "usage":
                raise UsageError(str(message.get("message")))
            else:
                return {**message, "watched_s": watched_s}


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Waits a moment for a process that is done; then ends it and everything it started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how_it_died(code: int, log: IO[bytes]) -> Outcome:
    log.seek(0)
    said = [
        line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()
    ]
    last_words = f": {said[-1][:250]}" if said else ""
    if code == -signal.SIGKILL:
        return Outcome("oom", "killed by the system (SIGKILL), most likely for want of memory")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return Outcome("fail_to_run", f"the subprocess {how}{last_words}", again=code < 0)
