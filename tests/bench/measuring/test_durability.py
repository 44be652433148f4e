"""What a killed, crowded or cramped sweep leaves behind: whole rows, and each case once.

The sweep, its rows and `--resume` are the real ones; only the subprocess that measures a case is
replaced, by a moment of sleep, so that twenty kills take seconds.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from resfuse.bench.common.errors import UsageError
from resfuse.bench.records import case_row, results
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Stamp
from resfuse.bench.running import sweep
from resfuse.bench.running.sweep import unsettled

CASE = Case("resnet18", "eager", "inference", "cpu", "float32", "contiguous", 1, 224)
CASES = [replace(CASE, batch_size=batch) for batch in range(1, 601)]
FOUND: dict[str, Any] = {
    "facts": {"device_name": "some CPU, 2 cores", "malloc": "=kept"},
    "ceilings": {}, "env_id": "0123456789", "commit": "c1",
}  # fmt: skip
# What a name or an error may hold, and a CSV file or a spreadsheet may trip over.
AWKWARD = 'a "quoted", odd\nname\r=1+1;\ttab'
FORK = multiprocessing.get_context("fork")


def passed(case: Case, *_: object) -> Outcome:
    time.sleep(random.random() / 200)
    return Outcome("pass", "", {"p50_ms": 1.5, "throttle": AWKWARD})


def sweep_in(folder: Path, cases: list[Case], told: int) -> None:
    """What `resfuse bench --resume` does once the machine is known; tells each finished case."""
    os.setsid()  # a group of its own, for the kill

    def finished(case: Case, outcome: Outcome) -> None:
        os.write(told, b"%d\n" % case.batch_size)

    os.write(told, b"0\n")
    with patch.object(sweep, "run_case", passed):
        results.record_environment(folder, FOUND["env_id"], FOUND["facts"])
        left = unsettled(cases, folder, FOUND)
        sweep.run(left, Options(), folder, FOUND, lambda case: None, finished)


def started(folder: Path, cases: list[Case], told: int) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=sweep_in, args=(folder, cases, told))
    process.start()
    return process


def batches(folder: Path) -> list[int]:
    return sorted(results.read_rows(folder).requested_batch_size.astype(int))


def test_kill_9_at_twenty_moments_loses_and_doubles_no_row(tmp_path: Path) -> None:
    moments = random.Random(9)
    told: set[int] = set()
    for _ in range(20):
        read, write = os.pipe()
        process = started(tmp_path, CASES, write)
        os.read(read, 2)  # it has begun
        time.sleep(moments.uniform(0, 0.15))
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        os.close(write)
        with os.fdopen(read) as lines:
            told |= {int(line) for line in lines}
        assert process.exitcode == -signal.SIGKILL, "the sweep was over before it was killed"
        there = batches(tmp_path) if results.has_rows(tmp_path) else []
        assert len(there) == len(set(there))
        assert told - {0} <= set(there)
    process = started(tmp_path, CASES, os.open(os.devnull, os.O_WRONLY))
    process.join()
    assert process.exitcode == 0
    assert batches(tmp_path) == [case.batch_size for case in CASES]
    assert set(results.read_rows(tmp_path).throttle) == {AWKWARD}
    assert results.read_environments(tmp_path) == {FOUND["env_id"]: FOUND["facts"]}


def test_a_line_cut_anywhere_costs_that_line_alone(tmp_path: Path) -> None:
    """Lengths a power cut may leave the last line in, within quotes and at its end."""
    stamp = Stamp("some CPU, 2 cores", FOUND["env_id"], FOUND["commit"], "2026-01-02T03:04:05")
    rows = [case_row.CASES.record(case.identity(), passed(case), stamp) for case in CASES[:3]]
    for row in rows[:2]:
        results.append_row(tmp_path, row)
    path = tmp_path / results.ROWS
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1  # of the header
    second = whole.index(b"\nresnet18", first) + 1  # the row's own line breaks are followed by more
    for end in sorted({*range(second, len(whole), 5), *range(len(whole) - 8, len(whole))}):
        path.write_bytes(whole[:end])
        settled = results.settled_cases(tmp_path, FOUND["env_id"], FOUND["commit"])
        assert settled == {results.identity_key(CASES[0])}
        results.append_row(tmp_path, rows[2])
        assert batches(tmp_path) == [1, 3]
        assert set(results.read_rows(tmp_path).throttle) == {AWKWARD}


def test_two_sweeps_into_one_folder_tear_nothing(tmp_path: Path) -> None:
    """Other cases each, and a file of an older version that both want to bring up to date."""
    stamp = Stamp("some CPU, 2 cores", FOUND["env_id"], "older", "2026-01-02T03:04:05")
    older = replace(CASE, batch_size=999)
    results.append_row(tmp_path, case_row.CASES.record(older.identity(), passed(older), stamp))
    path = tmp_path / results.ROWS
    header, rest = path.read_bytes().split(b"\n", 1)  # its columns in another order
    header, rest = header.removeprefix(b"model,"), rest.removeprefix(b"resnet18,").rstrip()
    path.write_bytes(header + b",model\n" + rest + b",resnet18\n")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sweeps = [started(tmp_path, part, nowhere) for part in (CASES[:80], CASES[80:160])]
    for one in sweeps:
        one.join()
    assert [one.exitcode for one in sweeps] == [0, 0]
    assert batches(tmp_path) == [*range(1, 161), 999]
    assert set(results.read_rows(tmp_path).model) == {"resnet18"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for a few dozen rows."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes Linux and root")
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"this system allows no mount of a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_in_a_sentence_and_leaves_whole_rows(small_disk: Path) -> None:
    nothing = lambda *_: None  # noqa: E731
    with patch.object(sweep, "run_case", passed):
        results.record_environment(small_disk, FOUND["env_id"], FOUND["facts"])
        with pytest.raises(UsageError, match="cannot be written: No space left on device"):
            sweep.run(CASES, Options(), small_disk, FOUND, nothing, nothing)
        there = batches(small_disk)
        assert there == list(range(1, len(there) + 1)) and len(there) > 10
        content = (small_disk / results.ENVIRONMENTS).read_bytes()
        with pytest.raises(UsageError, match="No space left on device"):
            results.record_environment(small_disk, "another", {"notes": "x" * 9000})
        assert (small_disk / results.ENVIRONMENTS).read_bytes() == content
        names = {path.name for path in small_disk.iterdir()}
        assert names == {results.ROWS, results.ENVIRONMENTS}  # no half-written copy is left

        subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
        left = unsettled(CASES[:100], small_disk, FOUND)
        sweep.run(left, Options(), small_disk, FOUND, nothing, nothing)
    assert batches(small_disk) == list(range(1, 101))
