"""Every file that is read back is damaged at random: what comes of it is what comes of a file that
says so, or a sentence on what is wrong or left out.

For the engine's own files see test_engine_fuzz.py, test_engine_poisoned_times.py.
"""

import contextlib
import io
import json
import lzma
import math
import os
import random
import signal
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import test_degradation
from test_kernel_report import POINT, SMALL, add_convolution
from test_learning_data import write_cifar

from readback import mutated
from report_rows import CASE, STAMP, add, text_of
from resfuse.bench.cli import main
from resfuse.bench.cluster.collect import collect
from resfuse.bench.common.errors import LeftOutWarning, UsageError
from resfuse.bench.distributed.leader import Leader, _follow
from resfuse.bench.layers.kernel_check import check_command
from resfuse.bench.records import results
from resfuse.bench.records.case import Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.running import subprocess_runner
from resfuse.bench.studies.models import models_study as models
from resfuse.bench.studies.models import models_table, speed_study, speed_table
from resfuse.bench.studies.models.speed_study import SPEEDS
from resfuse.bench.trainings import data
from resfuse.bench.trainings.degradation_sheet import SHEET as DEGRADATION
from resfuse.tools.gpu_plan import archive, carried, notes, plan_progress, questions
from resfuse.tools.gpu_plan.archive import Places
from resfuse.tools.gpu_plan.restore import restore

PATIENCE_S = 20
FOUND = {"env_id": STAMP.env_id, "commit": STAMP.commit, "device": "cpu"}


def few_rows(folder: Path) -> None:
    for batch in (1, 8):
        add(folder, replace(CASE, batch_size=batch))
        add(folder, replace(CASE, batch_size=batch, backend="fused"), rate=50.0)
    results.record_environment(folder, STAMP.env_id, {"device_name": STAMP.device_name})


def convolutions(folder: Path) -> None:
    for problem in (POINT, SMALL):
        add_convolution(folder, problem, "eager", 2.0)
        add_convolution(folder, problem, "fused", 1.5)


def trainings(folder: Path) -> None:
    for depth in (20, 56):
        test_degradation.add(folder, replace(test_degradation.RUN, depth=depth), 3.0)


def configurations(folder: Path) -> None:
    row = {"kernel": "bn_act", "label": "64", "math_mode": "fp16", "device_name": "x",
           "rel_l2_err": 1e-4, "status": "pass", **FOUND, "schema_version": 1}  # fmt: skip
    for label in ("64", "128"):
        results.append_row(folder, row | {"label": label}, check_command.SHEET)


def networks(folder: Path) -> None:
    row = {"network": "timm a", "img_size": 64, "convolutions": 20, "macs_fused_pct": 90.0,
           "eager_rel_l2": 1e-7, "fuse_status": "pass", "fuse_rel_l2": 1e-7,
           "engine_status": "refused", "engine_error": "so", **FOUND}  # fmt: skip
    for name in ("timm a", "timm b"):
        results.append_row(folder, row | {"network": name}, models.SHEET)


def speeds(folder: Path) -> None:
    row = {"network": "timm a", "batch_size": 1, "requested_img_size": 64, "engine_speedup": 1.2,
           "engine_speedup_ci_low": 1.1, "engine_speedup_ci_high": 1.3, "peak_mem_mb": 20.0,
           "status": "pass", "error": "", **FOUND, "schema_version": 1}  # fmt: skip
    for name in ("eager", "openvino", "engine"):
        results.append_row(folder, row | {"backend": name}, SPEEDS)


def report(folder: Path) -> None:
    for environment in read_folders([folder]):
        for comparison in environment.comparisons:
            for result in comparison.results:
                assert 0 <= result.batch_size <= results.MOST_COUNT
                assert all(math.isfinite(n) and n >= 0 for n in result.numbers.values()) or (
                    result.numbers.get("train_comm_time", 0) < 0
                )


def page(folder: Path) -> None:
    report(folder)
    text_of(folder)


def notes_of(folder: Path) -> None:
    (folder / notes.FILE).unlink(missing_ok=True)
    notes.write_if_missing(folder)


def compared(folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["compare", str(folder), str(folder)])
    assert code in (0, 1, 2)
    assert code != 2 or said.getvalue().splitlines()[-1].startswith("resfuse: error: ")


def collected(folder: Path) -> None:
    job = folder.parent / "job"
    (job / "machine").mkdir(parents=True)
    for path in folder.glob("*.csv"):
        (job / "machine" / path.name).write_bytes(path.read_bytes())
    for row in collect(job, folder.parent / "shared"):
        assert float(row["infer_samples_per_sec"] or 0) >= 0
    assert collect(job, folder.parent / "shared") == []


def table_of_models(folder: Path) -> None:
    models.settled(folder, FOUND, models.KINDS)
    rows = results.read_rows(folder, models.SHEET, only_whole=True)
    if len(rows):
        models_table.page(rows, models.KINDS)


def table_of_speeds(folder: Path) -> None:
    speed_study.settled(folder, FOUND, 64, ("eager", "openvino", "engine"))
    rows = results.read_rows(folder, SPEEDS, only_whole=True)
    if len(rows):
        models_table.page(None, models.KINDS, rows)
        speed_table.picture(rows)


def resumed(folder: Path) -> None:
    known = plan_progress.load(folder, "e", "c")
    assert set(known.ended.values()) <= set(plan_progress.ENDINGS)


def answered(folder: Path) -> None:
    answers = questions._read(folder, {"env_id": "e", "commit": "c"})
    json.dumps(sorted(answers))


def as_json(file: str, told: dict[str, Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / file).write_text(json.dumps({"env_id": "e", "commit": "c", **told}, indent=2))

    return write


# what writes the folder, the file that is damaged, what reads it, how many times
READERS: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], None], int]] = {
    "report, rows": (few_rows, results.ROWS, report, 30),
    "its page, rows": (few_rows, results.ROWS, page, 6),
    "its page, environments": (few_rows, results.ENVIRONMENTS, page, 8),
    "its page, convolutions": (convolutions, "kernels.csv", page, 8),
    "its page, trainings": (trainings, DEGRADATION.file, page, 2),
    "report, trainings": (trainings, DEGRADATION.file, report, 10),
    "compare": (few_rows, results.ROWS, compared, 15),
    "notes": (few_rows, results.ROWS, notes_of, 10),
    "notes, environments": (few_rows, results.ENVIRONMENTS, notes_of, 10),
    "jobs of a cluster": (few_rows, results.ROWS, collected, 10),
    "check": (
        configurations,
        "configs.csv",
        lambda f: check_command._settled(f, FOUND) and None,
        10,
    ),
    "study models": (networks, models.SHEET.file, table_of_models, 15),
    "study models, speeds": (speeds, SPEEDS.file, table_of_speeds, 15),
    "gpu-plan.json": (
        as_json(plan_progress.FILE, {"steps": {"a": "done"}}),
        plan_progress.FILE,
        resumed,
        15,
    ),
    "probe.json": (
        as_json(questions.FILE, {"answers": {"a": [1, {"b": 2.5}]}}),
        questions.FILE,
        answered,
        15,
    ),
}


class Hangs(BaseException):
    """Nothing that a reader catches."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal_of(read: Callable[[], object]) -> tuple[str, list[str]]:
    """What a reader refuses with, if it does, and what it says is left out: one line each."""
    with warnings.catch_warnings(record=True) as caught, in_time():
        warnings.simplefilter("always")
        try:
            read()
            said = ""
        except UsageError as error:
            said = str(error)
    left_out = [str(w.message) for w in caught if w.category is LeftOutWarning]
    for line in (said, *left_out):
        assert len(line) < 1000 and "\n" not in line.strip()
    return said, left_out


@pytest.mark.parametrize("what", READERS)
def test_damage_ends_in_a_sentence(what: str, tmp_path: Path) -> None:
    write, file, read, times = READERS[what]
    (whole := tmp_path / "whole").mkdir()
    write(whole)
    assert refusal_of(lambda: read(whole)) == ("", [])
    for seed in range(times):
        folder = tmp_path / str(seed) / "results"
        folder.mkdir(parents=True)
        write(folder)
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(mutated(random.Random(f"{what} {seed}"), content))
        refusal_of(lambda f=folder: read(f))  # type: ignore[misc]


def test_no_row_goes_in_silence(tmp_path: Path) -> None:
    """As many rows as lines, or a sentence: counted by line breaks, which these rows have none of
    within their cells."""
    few_rows(tmp_path)
    path = tmp_path / results.ROWS
    content = path.read_bytes()
    told = 0
    for seed in range(100):
        path.write_bytes(mutated(random.Random(seed), content))
        found: list[int] = []
        said, left_out = refusal_of(lambda f=found: f.append(len(results.read_rows(tmp_path))))  # type: ignore[misc]
        lines = [line for line in path.read_bytes().splitlines() if line]
        if said or left_out:
            told += 1
        else:
            assert found[0] >= len(lines) - 1 - (path.read_bytes()[-1:] != b"\n"), seed
    assert told > 30


# An archive, whose files are damaged, or which is


def pack(there: Places, folder: Path, file: Path) -> None:
    assert archive.pack(file, folder, there) == ""


def test_a_damaged_archive_ends_in_a_sentence(tmp_path: Path) -> None:
    there = Places(tmp_path / "results", tmp_path / "timings", None)
    few_rows(there.results / "cpu")
    as_json(plan_progress.FILE, {"steps": {}})(there.results / "cpu")
    there.timings.mkdir()
    (there.timings / "0123.jsonl").write_text('{"schema": 1, "environment": {}}\n{"part": "a"}\n')
    pack(there, there.results / "cpu", file := tmp_path / "whole.tar.xz")
    content = file.read_bytes()
    names = archive.unpack(file)
    for seed in range(20):
        rng = random.Random(seed)
        home = tmp_path / str(seed)
        damaged = tmp_path / f"{seed}.tar.xz"
        if seed % 2:
            damaged.write_bytes(mutated(rng, content))
        else:
            name = rng.choice(sorted(names))
            damaged.write_bytes(
                archive._tar([*(names | {name: mutated(rng, names[name])}).items()])
            )
        places = Places(home / "results", home / "timings", None)
        refusal_of(lambda d=damaged, p=places: restore(d, p))  # type: ignore[misc]
        assert {path.relative_to(home).parts[0] for path in home.rglob("*")} <= {
            "results",
            "timings",
        }
        assert not list(places.timings.glob("*")), "another environment's times"


@pytest.mark.parametrize("name", ["results/cpu/" + "x" * 300 + ".csv", "results/c\0u/rows.csv",
                                  "results/" + "y/" * 200 + "z.json"])  # fmt: skip
def test_names_that_no_file_can_have_are_said(name: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.tar.xz").write_bytes(archive._tar([(name, b"{}")]))
    refusal_of(lambda: restore(file, Places(tmp_path / "r", tmp_path / "t", None)))


def test_an_archive_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES", 16 << 20)
    (file := tmp_path / "a.tar.xz").write_bytes(lzma.compress(bytes(17 << 20), preset=0))
    assert file.stat().st_size < 1 << 18
    said, _ = refusal_of(lambda: archive.unpack(file))
    assert "unpacks to more than 16 MB" in said


def test_a_sparse_file_in_an_archive_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("results/cpu/rows.csv")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                          "GNU.sparse.realsize": str(1 << 40)}  # fmt: skip
    member.size = len(content := b"0\n" + bytes(510))
    with tarfile.open(file := tmp_path / "a.tar.xz", "w:xz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(content))
    assert "more than 512 MB" in refusal_of(lambda: archive.unpack(file))[0]


def test_carried_kernels_that_are_none_cost_a_sentence(tmp_path: Path) -> None:
    (file := tmp_path / "a.tar.xz").write_bytes(archive._tar([("manifest.json", b"[" * 99_999)]))
    os.mkfifo(pipe := tmp_path / "pipe.tar.xz")
    with in_time():
        for archived in (file, pipe):
            assert "is no whole archive" in carried.unpack(archived, tmp_path / "to")


# What is no file stands in the place of one


@pytest.mark.parametrize("file, read", [
    (results.ROWS, report), (results.ROWS, compared), (results.ENVIRONMENTS, report),
    (plan_progress.FILE, resumed), (questions.FILE, answered),
])  # fmt: skip
@pytest.mark.parametrize("what", ["a named pipe", "a device", "a hole of a terabyte"])
def test_what_is_no_file_is_no_wait(
    file: str, read: Callable[[Path], None], what: str, tmp_path: Path
) -> None:
    few_rows(tmp_path)
    (path := tmp_path / file).unlink(missing_ok=True)
    if what == "a named pipe":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    began = time.process_time()
    refusal_of(lambda: read(tmp_path))
    assert time.process_time() - began < 10
    if file == results.ROWS:
        assert "cannot be" in refusal_of(lambda: results.append_row(tmp_path, {}))[0]


# What other processes send


def messages() -> bytes:
    outcome = asdict(Outcome("pass", "", {"p50_ms": 2.5, "throttle": "none"}))
    told = [{"event": "timing"}, {"event": "timed"}, {"event": "news", "share": 0.5},
            {"event": "result", "outcome": outcome, "span_s": 0.001}]  # fmt: skip
    return b"".join(json.dumps(one).encode() + b"\n" for one in told)


def heard_of(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """What a case comes to whose process sends this, and ends."""

    class Process:
        returncode = 0
        stdin = io.BytesIO()

        def __init__(self, command: list[str], **named: Any) -> None:
            os.write(int(command[-1]), sent)

    monkeypatch.setattr(subprocess_runner.subprocess, "Popen", Process)
    monkeypatch.setattr(subprocess_runner, "_end", lambda process, grace_s: None)
    monkeypatch.setattr(Process, "stdin", io.BytesIO())
    return subprocess_runner.run_case(CASE, Options(timeout_s=5), {})


def test_damaged_messages_of_a_subprocess_are_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heard_of(messages(), monkeypatch).metrics["p50_ms"] == 2.5
    for seed in range(20):
        sent = mutated(random.Random(seed), messages())[:60_000]
        refusal_of(lambda s=sent: heard_of(s, monkeypatch))  # type: ignore[misc]


class Told(dict[str, bytes]):
    """A store in which everything stands already."""

    def check(self, keys: list[str]) -> bool:
        return True

    def set(self, key: str, value: str) -> None:
        pass


def test_damaged_messages_of_other_machines_are_their_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = Outcome("pass", "", {"p50_ms": 2.5})
    monkeypatch.setattr("resfuse.bench.distributed.leader.run_case", lambda *a, **b: passed)
    answer = json.dumps(asdict(passed)).encode()
    case = {"case": asdict(CASE), "options": asdict(Options()), "ceilings": {"a": 1.5}}
    for seed in range(10):
        rng = random.Random(seed)
        store = Told({"k/ended/1": mutated(rng, answer)})
        outcome = Leader(None, store)._answer("k", 1, 1.0)  # type: ignore[arg-type]
        assert outcome.status in (*results.SETTLED, "fail_to_run", "timeout")
        told = Told({"told/0": mutated(rng, json.dumps(case).encode()), "told/1": b'{"end": 0}'})
        monkeypatch.setattr(
            "resfuse.bench.distributed.leader.connect", lambda world, told=told: told
        )
        refusal_of(lambda: _follow(_World()))  # type: ignore[arg-type]


class _World:
    rank = 1


def test_damaged_batches_of_images_are_refused_or_images(tmp_path: Path) -> None:
    for binary in (False, True):
        write_cifar(folder := tmp_path / str(binary), binary)
        path = folder / (data.TEST_FILE + ".bin" * binary)
        content = path.read_bytes()
        for seed in range(10):
            path.write_bytes(mutated(random.Random(seed), content))
            refusal_of(lambda f=folder: data.load(str(f)))  # type: ignore[misc]
