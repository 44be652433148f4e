"""How many threads native steps run on: the affinity, the cgroup's quota, torch's threads, and what
a caller asks for.
"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from resfuse.kernels import build_engine
from resfuse.kernels.cpu import cpus
from resfuse.kernels.cpu.cpus import asking, threads, usable
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.fusion.fuse import fuse
from resfuse.kernels.tuning_cache.environment import device_name


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered from the test before."""
    monkeypatch.setattr(cpus, "_known", cpus._Known())
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()).eval()


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where limits are looked up; this process is in /a/b of both versions, on 8 CPUs."""
    (tmp_path / "self").write_text("5:memory:/x\n2:cpu,cpuacct:/a/b\n0::/a/b\n")
    monkeypatch.setattr(cpus, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cpus, "_OWN_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(cpus, "_affinity", lambda: 8)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("100000 100000", 1), ("350000 100000", 4), ("10000 100000", 1)],
)
def test_a_quota_of_cgroup_2_limits_the_threads(cgroups: Path, quota: str, expected: int) -> None:
    write(cgroups / "a" / "b", cpu__max="max 100000")
    write(cgroups / "a", cpu__max=quota)
    assert usable() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("200000", 2), ("49000", 1)])
def test_a_quota_of_cgroup_1_limits_the_threads(cgroups: Path, quota: str, expected: int) -> None:
    folder = cgroups / "cpu,cpuacct" / "a" / "b"
    write(folder, cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert usable() == expected


def test_in_a_container_the_root_has_the_limit(cgroups: Path) -> None:
    write(cgroups, cpu__max="300000 100000")
    assert usable() == 3


def test_damaged_limits_are_none(cgroups: Path) -> None:
    write(cgroups, cpu__max="much\n")
    write(cgroups / "cpu", cpu__cfs_quota_us="100000")
    assert usable() == 8


def test_the_fewer_of_torchs_threads_and_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_affinity", lambda: 3)
    for torchs, expected in (1, 1), (2, 2), (5, 3):
        torch.set_num_threads(torchs)
        assert threads() == expected
    with asking(7):
        assert threads() == 7


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_an_affinity_that_changes_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("one CPU")
    monkeypatch.setattr(cpus, "_CACHED_S", 0.01)
    fused, x = fuse(small()), torch.randn(1, 3, 40, 40)
    with torch.inference_mode():
        want = fused(x)
        torch.set_num_threads(2)
        try:
            assert threads() == 2
            os.sched_setaffinity(0, {min(mine)})
            time.sleep(0.02)
            assert threads() == 1
            assert torch.equal(fused(x), want)
        finally:
            os.sched_setaffinity(0, mine)
        time.sleep(0.02)
        assert threads() == 2
        assert torch.equal(fused(x), want)


def test_each_thread_has_its_own_count() -> None:
    found: list[int] = []
    with asking(5):
        other = threading.Thread(target=lambda: found.append(threads()))
        other.start()
        other.join()
    assert found == [min(torch.get_num_threads(), usable())]


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "2", 257])
def test_what_is_no_number_of_threads_is_refused(count: object) -> None:
    said = "argument threads: .*; accepted: 1 to 256, or None"
    with pytest.raises(ValueError, match=said):
        build_engine(small(), torch.randn(1, 3, 8, 8), threads=count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        fuse(small(), threads=count)  # type: ignore[arg-type]


def test_more_threads_than_cpus_work_and_are_told_of(timings: Path) -> None:
    model, x = small(), torch.randn(2, 3, 20, 20)
    many = usable() + 3
    with torch.inference_mode():
        want = fuse(model, threads=1)(x)
        with pytest.warns(UserWarning, match=rf"argument threads: {many}; .* {usable()} CPUs"):
            assert torch.equal(fuse(model, threads=many)(x), want)
        with pytest.warns(UserWarning, match=rf"argument threads: {many}; .* {usable()} CPUs"):
            engine = build_engine(model, x, threads=many, timings=timings)
    torch.testing.assert_close(engine(x), want)


def test_an_engine_keeps_the_threads_it_was_asked_to_run_on(
    timings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "_affinity", lambda: 4)
    torch.set_num_threads(2)
    x = torch.randn(2, 3, 20, 20)
    engine = build_engine(small(), x, threads=3, timings=timings)
    engine.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert (engine.threads, loaded.threads) == (3, 3)
    assert torch.equal(loaded(x), engine(x))


def test_times_are_kept_by_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_affinity", lambda: 2)
    torch.set_num_threads(2)
    names = [device_name(torch.device("cpu"))]
    for count in (1, 3):
        with asking(count):
            names.append(device_name(torch.device("cpu")))
    torch.set_num_threads(1)
    names.append(device_name(torch.device("cpu")))
    assert len(set(names)) == 4
