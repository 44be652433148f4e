"""A `python` that has torch loaded: what it runs is forked from a server, which imports it once.

`import torch` takes 5.7 CPU seconds, and each case of a sweep is a process of its own. The program
that `serving` writes stands in for the interpreter: asked for `-m resfuse.bench...`, it hands its
descriptors, environment and folder to the server, and ends as the fork does; killed, it takes the
fork with it. Anything else it passes on to the interpreter. Nothing of resfuse is loaded before
the fork, so that copies of the sources can be run.
"""

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

LOADED = (
    "torch._dynamo",
    "torch.export",
    "torchvision",
    "pandas",
    "rich.table",
    "matplotlib.figure",
)
PROGRAM = """#!{python} -IS
import ctypes, json, os, signal, socket, sys
if sys.argv[1:2] != ["-m"] or not sys.argv[2].startswith("resfuse.bench"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
numbers = []
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        numbers += [number] * os.get_inheritable(number)
    except OSError:
        pass  # the listing itself
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
told = [sys.argv, numbers, os.getcwd(), dict(os.environ), list(os.sched_getaffinity(0))]
socket.send_fds(server, [json.dumps(told).encode()], numbers)
code = int(server.recv(100) or 1)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """Yields the program; its forks began in `environment`, as far as libraries read it once."""
    program, address = folder / "python", folder / "server"
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, __file__, str(address)], env=environment, **pipes) as it:
        assert it.stdout is not None and it.stdout.readline() == b"ready\n"
        yield program  # then closes its stdin, which ends it


def _serve(address: str) -> None:
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()
    assert len([*Path("/proc/self/task").iterdir()]) == 1  # a process of several may not fork
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    while listener in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            _attend(connection)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Forks what is asked for, and waits for its end or for that of the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told, given, _, _ = socket.recv_fds(connection, 1 << 20, 64)
    if not (fork := os.fork()):
        _become(*json.loads(told), given)
    for descriptor in given:
        os.close(descriptor)
    if connection in select.select([connection, os.pidfd_open(fork)], [], [])[0]:
        with suppress(ProcessLookupError):
            os.killpg(fork, signal.SIGKILL)
    with suppress(BrokenPipeError):
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])).encode())
    os._exit(0)


def _become(
    arguments: list[str],
    numbers: list[int],
    folder: str,
    environment: dict[str, str],
    cpus: list[int],
    given: list[int],
) -> NoReturn:
    """Runs the module as the interpreter does that is asked for it."""
    os.setsid()
    given = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 512) for descriptor in given]
    os.closerange(3, 512)
    for descriptor, number in zip(given, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace")
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.sched_setaffinity(0, cpus)
    sys.path[:1] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.executable, _, module, *rest = arguments
    sys.argv = [module, *rest]
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
