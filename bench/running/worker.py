"""The subprocess that does the work: `python -m resfuse.bench.running.worker FD`, a job as JSON on
stdin, messages to FD.

A job names a function, as "module:function", and its payload. The function takes the payload and
`tell(event, ...)`, which sends a message, and returns what the result message holds.

Each message is a JSON object on a line: {"event": "timing"}, {"event": "timed"}, {"event":
"news", ...} where a job has something to tell on the way, then {"event":
"result", ...} or {"event": "usage", "message": ...}. stdout and stderr are free for whatever the
backends print.
"""

import atexit
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from resfuse.bench.common.errors import UsageError

PR_SET_PDEATHSIG = 1


def main() -> None:
    descriptor = int(sys.argv[1])
    die_with_parent()
    ignore_notices()
    job = json.load(sys.stdin)

    def tell(event: str, **content: Any) -> None:
        os.write(descriptor, json.dumps({"event": event, **content}).encode() + b"\n")

    try:
        tell("result", **_load(job["task"])(job["payload"], tell))
    except UsageError as error:
        tell("usage", message=str(error))
    end()


def end() -> NoReturn:
    """Ends a process whose message is sent, without freeing what it holds object by object: that
    takes half a second once torch is loaded, and the parent waits for it."""
    atexit._run_exitfuncs()  # temporary files, other people's processes
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _load(task: str) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    module, function = task.split(":")
    found: Callable[[dict[str, Any], Any], dict[str, Any]]
    found = getattr(importlib.import_module(module), function)
    return found


def ignore_notices() -> None:
    """Ignores the signal by which a cluster tells all processes of a job that its time is up: the
    parent reacts, and a worker that died of it would leave a failed row."""
    for notice in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(notice, signal.SIG_IGN)


def die_with_parent(parent: int | None = None) -> None:
    """Makes this process end with its parent (Linux), so that a killed harness leaves nothing
    behind that slows down the next one.

    Args:
        parent: its process id, where it may have ended while this process was starting.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
