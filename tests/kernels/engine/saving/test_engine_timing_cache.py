"""Measured times on disk: what is damaged or from elsewhere is never trusted, and nothing that was
measured is lost.
"""

import json
import math
import os
import resource
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resfuse.kernels.engine.cost.ceilings import Ceilings
from resfuse.kernels.tuning_cache import timing_cache
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TIMES = {("conv 1", "native"): 0.5, ("conv 1", "onednn"): None, ("conv 2", "eager"): 3.0}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with TIMES in it."""
    cache = TimingCache(CPU, tmp_path)
    for key, ms in TIMES.items():
        cache.put(key, ms)
    return cache.path


def times_in(folder: Path) -> dict[tuple[str, str], float | None]:
    """As a new build reads them, of the keys of TIMES; without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = TimingCache(CPU, folder)
    return {key: cache.get(key) for key in TIMES if key in cache}


def test_times_come_back_in_another_process(written: Path, tmp_path: Path) -> None:
    assert times_in(tmp_path) == TIMES
    assert ("conv 3", "native") not in TimingCache(CPU, tmp_path)


def test_the_latest_time_counts(written: Path, tmp_path: Path) -> None:
    TimingCache(CPU, tmp_path).put(("conv 1", "native"), 0.25)
    assert times_in(tmp_path)["conv 1", "native"] == 0.25


def test_a_time_from_a_busy_machine_is_taken_again_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_cache, "NOISY_SPREAD", 0.25)
    noisy, quiet = ("conv 1", "native"), ("conv 2", "native")

    def read() -> TimingCache:
        return TimingCache(CPU, tmp_path)

    for tries in range(timing_cache.MOST_TRIES):
        cache = read()
        assert cache.is_to_be_taken_again(noisy) == (tries > 0)
        cache.put(noisy, 0.5, spread=0.6)
        cache.put(quiet, 0.5, spread=0.1)
        assert not cache.is_to_be_taken_again(noisy), "what this build has taken serves this build"
    assert not any(map(read().is_to_be_taken_again, (noisy, quiet)))
    read().put(quiet, 0.5, spread=0.6)
    assert read().is_to_be_taken_again(quiet)
    read().put(quiet, 0.4, spread=0.0)
    assert not read().is_to_be_taken_again(quiet)


@pytest.mark.parametrize(
    "line",
    [
        '{"part": "conv 1", "choice": "native", "ms": 2.0, "spread": -1}',
        '{"part": "conv 1", "choice": "native", "ms": 2.0, "spread": "much"}',
        '{"part": "conv 1", "choice": "native", "ms": 2.0, "spread": NaN}',
        "not JSON at all",
        "[1, 2, 3]",
        "null",
        '{"part": "conv 1"',
        '{"part": "conv 1", "choice": "native"}',
        '{"part": 1, "choice": "native", "ms": 0.1}',
        '{"part": "conv 1", "choice": null, "ms": 0.1}',
        '{"part": "conv 1", "choice": "native", "ms": -1}',
        '{"part": "conv 1", "choice": "native", "ms": 0}',
        '{"part": "conv 1", "choice": "native", "ms": NaN}',
        '{"part": "conv 1", "choice": "native", "ms": Infinity}',
        '{"part": "conv 1", "choice": "native", "ms": 1e300}',
        '{"part": "conv 1", "choice": "native", "ms": "0.1"}',
        '{"part": "conv 1", "choice": "native", "ms": true}',
        '{"part": "conv 1", "choice": "native", "ms": [0.1]}',
        '{"part": "conv 1", "choice": "native", "ms": 5e-324}',
        '{"part": "conv 1", "choice": "native", "ms": ' + "9" * 5000 + "}",
        '{"part": "conv 1", "choice": "native", "ms": 0.1, "ms": 9}',
        '{"part": "conv 1", "choice": "native", "ms": 0.1, "forgotten": true}',
        '{"part": "conv 1", "choice": "native", "forgotten": 1}',
        '{"part": "conv 1", "choice": "native", "ms": 9, "why": "' + "x" * (1 << 20) + '"}',
        '{"part": "conv 1", "choice": "native", "ms": 9, "why": ' + "[" * 100_000 + "}",
        "\x00\x00\x00",
        "[" * 100_000,
    ],
    ids=lambda line: line[:60],
)
def test_a_damaged_line_is_left_out_and_told(written: Path, tmp_path: Path, line: str) -> None:
    with written.open("a") as file:
        file.write(line + "\n")
    with pytest.warns(UserWarning, match="1 damaged line"):
        cache = TimingCache(CPU, tmp_path)
    assert {key: cache.get(key) for key in TIMES} == TIMES


def test_bytes_that_are_no_text_are_left_out(written: Path, tmp_path: Path) -> None:
    with written.open("ab") as file:
        file.write(b"\xff\xfe\x00{}\n")
        file.write(b'{"part": "conv 1", "choice": "native", "ms": 9, "why": "\xff"}\n')
    with pytest.warns(UserWarning, match="2 damaged lines"):
        cache = TimingCache(CPU, tmp_path)
    assert {key: cache.get(key) for key in TIMES} == TIMES


def test_a_torn_last_line_costs_itself_only(written: Path, tmp_path: Path) -> None:
    """What a process that died left behind; the next one's first time is on a line of its own."""
    written.write_bytes(written.read_bytes()[:-9])
    whole = dict(list(TIMES.items())[:-1])
    with pytest.warns(UserWarning, match="1 damaged line"):
        cache = TimingCache(CPU, tmp_path)
    assert {key: cache.get(key) for key in TIMES if key in cache} == whole
    cache.put(("conv 2", "eager"), 4.0)
    with pytest.warns(UserWarning, match="1 damaged line"):
        again = TimingCache(CPU, tmp_path)
    assert {key: again.get(key) for key in TIMES} == {**whole, ("conv 2", "eager"): 4.0}


def replace_header(path: Path, change: dict[str, object]) -> None:
    header, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(header) | change) + "\n", *rest]))


@pytest.mark.parametrize(
    "change", [{"environment": {"device": "another processor"}}, {"schema": 0}, {"schema": None}]
)
def test_times_from_elsewhere_are_set_aside(
    written: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    replace_header(written, change)
    theirs = written.read_text()
    with pytest.warns(UserWarning, match="another environment"):
        cache = TimingCache(CPU, tmp_path)
    assert not any(key in cache for key in TIMES)
    assert written.with_suffix(".foreign").read_text() == theirs
    cache.put(("conv 1", "native"), 0.75)
    assert times_in(tmp_path) == {("conv 1", "native"): 0.75}


def test_times_under_two_headers_are_not_trusted(written: Path, tmp_path: Path) -> None:
    """One of them is another machine's, and the lines do not say which are whose."""
    with written.open("a") as file:
        file.write('{"schema": 1, "environment": {"device": "another processor"}}\n')
    with pytest.warns(UserWarning, match="another environment"):
        cache = TimingCache(CPU, tmp_path)
    assert not any(key in cache for key in TIMES)


def test_times_without_a_header_are_not_trusted(written: Path, tmp_path: Path) -> None:
    written.write_text("".join(written.read_text().splitlines(keepends=True)[1:]))
    with pytest.warns(UserWarning, match="another environment"):
        cache = TimingCache(CPU, tmp_path)
    assert not any(key in cache for key in TIMES)


def test_another_number_of_threads_is_another_environment(written: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert times_in(tmp_path) == {}
        assert TimingCache(CPU, tmp_path).path != written
    finally:
        torch.set_num_threads(before)


def test_an_unwritable_folder_is_a_warning_and_times_are_kept_here(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may be told already that nothing can be read
        cache = TimingCache(CPU, tmp_path / "folder")
    with pytest.warns(UserWarning, match="not kept"):
        cache.put(("conv 1", "native"), 0.5)
    assert cache.get(("conv 1", "native")) == 0.5


def test_a_folder_in_the_files_place_is_a_warning(tmp_path: Path) -> None:
    TimingCache(CPU, tmp_path).path.mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        cache = TimingCache(CPU, tmp_path)
    with pytest.warns(UserWarning, match="not kept"):
        cache.put(("conv 1", "native"), 0.5)
    assert cache.get(("conv 1", "native")) == 0.5


def test_a_full_disk_is_a_warning_and_costs_one_time(written: Path, tmp_path: Path) -> None:
    """No file may grow past the next few bytes, which a write meets as it meets a full disk."""
    cache = TimingCache(CPU, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (written.stat().st_size + 9, limits[1]))
    try:
        with pytest.warns(UserWarning, match="not kept"):
            cache.put(("conv 1", "native"), 0.25)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cache.get(("conv 1", "native")) == 0.25
    cache.put(("conv 2", "native"), 0.125)
    with pytest.warns(UserWarning, match="1 damaged line"):
        again = TimingCache(CPU, tmp_path)
    assert {key: again.get(key) for key in TIMES} == TIMES
    assert again.get(("conv 2", "native")) == 0.125


def test_a_file_that_was_made_and_never_written_to_gets_its_header(tmp_path: Path) -> None:
    TimingCache(CPU, tmp_path).path.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TimingCache(CPU, tmp_path).put(("conv 1", "native"), 0.5)
    assert times_in(tmp_path) == {("conv 1", "native"): 0.5}


def test_a_file_that_is_emptied_meanwhile_gets_its_header_again(
    written: Path, tmp_path: Path
) -> None:
    cache = TimingCache(CPU, tmp_path)
    os.truncate(written, 0)
    cache.put(("conv 1", "native"), 0.5)
    assert times_in(tmp_path) == {("conv 1", "native"): 0.5}


def test_a_file_that_is_too_large_is_set_aside_unread(written: Path, tmp_path: Path) -> None:
    os.truncate(written, 1 << 40)  # a hole: it takes no room on the disk
    with pytest.warns(UserWarning, match="more than 32 MB") as told:
        cache = TimingCache(CPU, tmp_path)
    assert len(told) == 1 and not any(key in cache for key in TIMES)
    cache.put(("conv 1", "native"), 0.75)
    assert times_in(tmp_path) == {("conv 1", "native"): 0.75}


PLACED: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "links in a circle": lambda path: path.symlink_to(path),
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("what", PLACED)
def test_what_is_no_file_is_a_warning_and_no_wait(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = TimingCache(CPU, tmp_path).path
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    PLACED[what](Path(path.name))
    with pytest.warns(UserWarning, match="cannot be read"):
        cache = TimingCache(CPU, tmp_path)
    with pytest.warns(UserWarning, match="not kept"):
        cache.put(("conv 1", "native"), 0.5)
    assert cache.get(("conv 1", "native")) == 0.5


WRITER = """
import sys
from pathlib import Path
import torch
from resfuse.kernels.tuning_cache.timing_cache import TimingCache
cache = TimingCache(torch.device("cpu"), Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    cache.put((sys.argv[2] * 200, str(i)), i + 1.0)
"""


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    """Both begin with no file there, and write at the same time."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in "ab"
    ]  # fmt: skip
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate()
        assert process.returncode == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = TimingCache(CPU, tmp_path)
    for name in "ab":
        assert [cache.get((name * 200, str(i))) for i in range(300)] == [
            i + 1.0 for i in range(300)
        ]


def ceilings_in(cache: TimingCache) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in cache.path.read_text().splitlines()[1:]]
    assert {row["part"] for row in rows} == {"ceiling"}
    return [(row["part"], row["choice"]) for row in rows]


def test_the_highest_ceilings_ever_measured_stay(tmp_path: Path) -> None:
    cache = TimingCache(CPU, tmp_path)
    measured = Ceilings(CPU, torch.float32, cache)
    flops, moved = round(1e6 * measured.gflops), round(1e6 * measured.gb_per_s)
    assert math.isclose(measured.floor_ms(flops, 0), 1.0, rel_tol=1e-3)
    assert math.isclose(measured.floor_ms(flops, 3 * moved), 3.0, rel_tol=1e-3)
    again = Ceilings(CPU, torch.float32, TimingCache(CPU, tmp_path))
    assert again.gflops >= measured.gflops and again.gb_per_s >= measured.gb_per_s
    for what in ceilings_in(cache):
        ms = cache.get(what)
        assert ms is not None
        cache.put(what, ms / 10)  # in a quieter hour than there will ever be
    later = Ceilings(CPU, torch.float32, TimingCache(CPU, tmp_path))
    assert later.gflops > 5 * measured.gflops and later.gb_per_s > 5 * measured.gb_per_s


def test_ceilings_beyond_belief_are_measured_again(tmp_path: Path) -> None:
    cache = TimingCache(CPU, tmp_path)
    measured = Ceilings(CPU, torch.float32, cache)
    assert measured.floor_ms(1, 1) > 0
    for what in ceilings_in(cache):
        cache.put(what, 1e-6)
    again = Ceilings(CPU, torch.float32, TimingCache(CPU, tmp_path))
    assert again.gflops < 1e3 * measured.gflops and again.gb_per_s < 1e3 * measured.gb_per_s


def test_ceilings_that_were_barred_are_measured_again(tmp_path: Path) -> None:
    """No time, where one is always to be had, is as absurd as a negative one."""
    cache = TimingCache(CPU, tmp_path)
    Ceilings(CPU, torch.float32, cache).floor_ms(1, 1)
    for what in ceilings_in(cache):
        cache.put(what, None)
    assert Ceilings(CPU, torch.float32, TimingCache(CPU, tmp_path)).gflops > 0
