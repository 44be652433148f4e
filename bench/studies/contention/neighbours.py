"""Busy processes: `python neighbours.py NICE [CPU]` is one of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from resfuse.bench.running.worker import die_with_parent
from resfuse.bench.studies.contention.scenarios import Scenario


@contextmanager
def busy(scenario: Scenario) -> Iterator[None]:
    """Runs the scenario's neighbours; they have begun when the block is entered."""
    own = [str(scenario.nice)]
    if scenario.pinned:
        own.append(str(min(os.sched_getaffinity(0))))
    started = [
        subprocess.Popen([sys.executable, "-m", __name__, *own], stdout=subprocess.PIPE)
        for _ in range(scenario.neighbours)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _be_busy(nice: int, cpus: list[int]) -> None:
    die_with_parent()
    os.nice(nice)
    if cpus:
        os.sched_setaffinity(0, cpus)
    print("busy", flush=True)
    while True:
        pass


if __name__ == "__main__":
    _be_busy(int(sys.argv[1]), [int(cpu) for cpu in sys.argv[2:]])
