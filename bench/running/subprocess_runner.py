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
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import inf
from typing import IO, Any

from resfuse.bench.common import json_file
from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.clock.timing import Watch, seconds
from resfuse.bench.measuring.probes import allocator
from resfuse.bench.records.case import SERVER, Case, Options
from resfuse.bench.records.outcome import Outcome, outcome_from

MEASURE = "resfuse.bench.measuring.measure_case:measure_task"
SERVE = "resfuse.bench.measuring.measure_server:measure_server_task"
GRACE_S = 5.0
# The parent shares two cores with the work it watches, and wakes late at times.
WATCH_SLACK_S, WATCH_SLACK = 0.5, 0.1
EVENTS = ("timing", "timed", "news", "usage", "result")
# Something in the subprocess writes to every descriptor that is open.
NO_SENSE = Outcome("fail_to_run", "the subprocess sent something that is no message of ours")


def run_case(
    case: Case,
    options: Options,
    ceilings: dict[str, float],
    backends: Mapping[str, str] | None = None,
    task: str = "",
    **more: str,
) -> Outcome:
    """Measures a case in a subprocess of its own, within the time limit.

    Args:
        backends: name -> "module:function" that the case may name beside BACKENDS; for studies.
        task: "module:function" that measures it in the subprocess, and takes `more` as well;
            without, the one of its scenario.

    Raises:
        UsageError: the subprocess found the user's input at fault.
        KeyboardInterrupt: after the subprocess was killed.
    """
    payload = {
        "case": asdict(case),
        "options": asdict(options),
        "ceilings": ceilings,
        "backends": dict(backends or {}),
        **more,
    }
    task = task or (SERVE if case.scenario == SERVER else MEASURE)
    result = run_task(task, payload, options.timeout_s)
    if isinstance(result, Outcome):
        return result
    try:
        outcome, span_s = outcome_from(result["outcome"]), float(result["span_s"])
    except (ValueError, KeyError, TypeError):
        return NO_SENSE
    return compare_watches(outcome, span_s, result["watched_s"])


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


def run_task(
    task: str,
    payload: Mapping[str, Any],
    timeout_s: float,
    heard: Callable[[dict[str, Any]], None] = _ignore,
    silence_s: float = inf,
) -> dict[str, Any] | Outcome:
    """Runs a function in a subprocess and waits for what it returns; where that never comes, an
    Outcome that says how the subprocess ended.

    Args:
        task: "module:function", see worker.py.
        payload: what the function is given; it must go through JSON.
        heard: gets what is told on the way.
        silence_s: the longest time between two messages.

    Raises:
        UsageError: the function found the user's input at fault.
        KeyboardInterrupt: after the subprocess was killed.
    """
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "resfuse.bench.running.worker", str(write)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[write], start_new_session=True,
            env=allocator.keeping(os.environ),
        )  # fmt: skip
        os.close(write)
        grace_s = GRACE_S  # for a process that is done, or dying on its own
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"task": task, "payload": payload}).encode())
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
    """Returns the result message with `watched_s` added; None where the process ended without one.

    Raises:
        ValueError: what came is no message.
    """
    watch = Watch()
    pending, began, watched_s, last = b"", 0.0, 0.0, 0.0
    while True:
        now = seconds(watch.elapsed())
        remaining_s = min(timeout_s - now, silence_s - (now - last))
        if remaining_s <= 0 or not select.select([read], [], [], remaining_s)[0]:
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
