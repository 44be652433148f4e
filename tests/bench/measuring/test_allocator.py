"""The allocator's settings reach the processes that measure, and the memory probe does without."""

import os
import platform
import subprocess
import sys

import pytest

from resfuse.bench.measuring.probes import allocator
from resfuse.bench.records.case import Case, Options
from resfuse.bench.running import subprocess_runner

GLIBC = platform.libc_ver()[0] == "glibc"
CASE = Case("cifar_resnet20", "eager", "inference", "cpu", "float32", "contiguous", 2, 32)
# A set-up and a step that each leave a hole below a tensor they still hold. The step's first tensor
# fits into set-up's hole; its third one fits into neither.
PROBE = """
import torch
from resfuse.bench.measuring.probes import peak_memory as memory

def set_up():
    first, second = torch.ones(32 * 2**18), torch.ones(10 * 2**18)
    return second

def step():
    first, second = torch.ones(30 * 2**18), torch.ones(10 * 2**18)
    del first
    third = torch.ones(40 * 2**18)

before = memory.held("cpu")
held = set_up()
print(memory.peak_of(step, "cpu", before).peak // 2**20)
torch.ones(64 * 2**18)
print(memory._status("VmRSS") // 2**20 - before // 2**20)
"""


def test_the_users_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    told = allocator.keeping({"MALLOC_TRIM_THRESHOLD_": "65536", "HOME": "/home/a"})
    assert told == {
        "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "HOME": "/home/a",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("libc", "mapped"),
    [(("glibc", "2.31"), "33554432"), (("glibc", "2.35"), "4000000000"), (("", ""), None)],
)
def test_each_c_library_is_told_what_it_takes(
    libc: tuple[str, str], mapped: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    assert allocator.keeping({}).get("MALLOC_MMAP_THRESHOLD_") == mapped


def test_the_setting_is_a_fact() -> None:
    assert allocator.described({"HOME": "/home/a"}) == "default"
    said = allocator.described({"MALLOC_MMAP_THRESHOLD_": "5", "MALLOC_TRIM_THRESHOLD_": "4"})
    assert said == "MALLOC_TRIM_THRESHOLD_=4 MALLOC_MMAP_THRESHOLD_=5"


@pytest.mark.skipif(not GLIBC, reason="the settings are glibc's")
def test_every_worker_is_started_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of jobs: the survey writes the fact down, the measurement runs under it."""
    started: list[dict[str, str]] = []
    popen = subprocess.Popen

    def watched(*arguments, **options):  # type: ignore[no-untyped-def]
        started.append(options["env"])
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess_runner.subprocess, "Popen", watched)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "77777777")
    outcome = subprocess_runner.run_case(CASE, Options(seconds=0.05, min_rounds=2), {})
    assert outcome.status == "pass", outcome.error
    (environment,) = started
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "77777777"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == allocator.keeping({})["MALLOC_MMAP_THRESHOLD_"]


@pytest.mark.skipif(not GLIBC, reason="the settings are glibc's")
def test_the_memory_probe_counts_what_a_step_holds_not_what_the_allocator_keeps() -> None:
    """At most 60 MB are held at a time; after the probe, 64 MB that were freed stay resident."""
    environment = allocator.keeping(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    peak, kept = map(int, done.stdout.split())
    assert 60 <= peak < 70
    assert kept >= 60  # the setting is back in force
