"""rows.csv: crash-safe, typed, never torn, and strict about foreign files."""

import multiprocessing
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from resfuse.bench import cli
from resfuse.bench.common.errors import LeftOutWarning, UsageError
from resfuse.bench.records import results
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.case_row import CASES, columns
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import ENDED, Stamp
from resfuse.bench.running import session

CASE = Case("resnet18", "eager", "inference", "cpu", "float32", "contiguous", 8, 224)
STAMP = Stamp("some CPU, 2 cores", "0123456789", "1e5", "2026-01-02T03:04:05+00:00")


def row(case: Case = CASE, status: str = "pass", error: str = "") -> dict:
    return CASES.record(case.identity(), Outcome(status, error, {"p50_ms": 12.5}), STAMP)


def test_a_row_comes_back_as_it_went_in(tmp_path: Path) -> None:
    results.append_row(tmp_path, row(error='a "quoted", odd\nsentence'))
    read = results.read_rows(tmp_path)
    assert tuple(read.columns) == columns()
    first = read.iloc[0]
    assert (first.p50_ms, first.model, first.requested_batch_size) == (12.5, "resnet18", 8)
    assert first.commit == "1e5"  # text, though it looks like a number
    assert first.error == 'a "quoted", odd\nsentence'
    assert first.isna().speedup  # empty, not zero


def test_the_row_says_what_design_says() -> None:
    """timm's names first, and every column the project has promised."""
    names = columns()
    assert names[:3] == ("model", "infer_img_size", "train_img_size")
    promised = """infer_samples_per_sec infer_step_time infer_batch_size param_count infer_gmacs
    infer_macts train_samples_per_sec train_step_time train_batch_size backend mode precision
    math_mode memory_format device_name requested_batch_size p50_ms p90_ms p99_ms rounds peak_mem_mb
    reserved_mem_mb setup_s break_even_images floor_ms sol_pct joules_per_image rel_l2_err
    max_abs_err top1_agree err_vs_eager baseline speedup speedup_ci_low speedup_ci_high sm_clock_mhz
    throttle other_load status error env_id commit timestamp schema_version"""
    assert set(promised.split()) <= set(names)
    assert names[-6:] == ENDED


def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    for _ in range(2):
        results.append_row(tmp_path, row())
    with (tmp_path / results.ROWS).open("a") as file:
        file.write("resnet50,22")  # killed in the middle of a write
    results.append_row(tmp_path, row())
    assert len(results.read_rows(tmp_path)) == 3


def test_older_rows_gain_the_columns_a_new_metric_brings(tmp_path: Path) -> None:
    results.append_row(tmp_path, row())
    path = tmp_path / results.ROWS
    older = path.read_text().replace("p90_ms,", "", 1)
    path.write_text(older.replace(",12.5,,", ",12.5,", 1))
    results.append_row(tmp_path, row())
    read = results.read_rows(tmp_path)
    assert len(read) == 2
    assert read.p90_ms.isna().all()
    assert list(read.p50_ms) == [12.5, 12.5]


def test_foreign_columns_are_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / results.ROWS
    path.write_text("model,speed\nresnet18,3\n")
    with pytest.raises(UsageError, match="columns this version does not know: speed"):
        results.append_row(tmp_path, row())
    with pytest.raises(UsageError, match="lacks the columns infer_img_size"):
        results.read_rows(tmp_path)
    assert path.read_text() == "model,speed\nresnet18,3\n"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00broken", b'a,"b\n'])
def test_files_that_are_no_tables_get_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / results.ROWS).write_bytes(content)
    with pytest.raises(UsageError, match=r"rows\.csv"):
        results.read_rows(tmp_path)


@pytest.mark.parametrize("cell", ["inf", "1e999", "-inf", "nan", "9" * 400, "two", "-1", "2.5"])
@pytest.mark.parametrize("column", ["world_size", "infer_img_size", "requested_batch_size"])
def test_a_row_without_a_number_is_left_out_and_told(
    tmp_path: Path, column: str, cell: str
) -> None:
    results.append_row(tmp_path, row())
    table = pd.read_csv(tmp_path / "rows.csv", dtype=str, keep_default_na=False)
    table[column] = cell
    table.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.warns(LeftOutWarning, match=f"rows.csv: left out line 2: .* in column {column}"):
        read = results.read_rows(tmp_path)
    assert read.empty
    with pytest.warns(LeftOutWarning):
        assert results.settled_cases(tmp_path, STAMP.env_id, STAMP.commit) == set()


def test_the_world_of_an_older_row_is_one_process(tmp_path: Path) -> None:
    results.append_row(tmp_path, row())
    table = pd.read_csv(tmp_path / "rows.csv", dtype=str, keep_default_na=False)
    table.drop(columns="world_size").to_csv(tmp_path / "rows.csv", index=False)
    assert list(results.read_rows(tmp_path).world_size) == [1]


@pytest.mark.parametrize("known", ["", "fast", "inf", "nan"])
def test_a_ceiling_that_is_no_number_gives_way(tmp_path: Path, known: str) -> None:
    results.record_environment(tmp_path, "e", {"cpu": "x", "ceiling_gflops": known})
    with pytest.warns(LeftOutWarning, match="as ceiling_gflops"):
        results.record_environment(tmp_path, "e", {"cpu": "x", "ceiling_gflops": "3.5"})
    assert results.read_environments(tmp_path)["e"]["ceiling_gflops"] == "3.5"


def test_missing_folder_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="resfuse bench --results DIR"):
        results.read_rows(tmp_path / "none")


def test_an_unwritable_folder_is_found_before_anything_runs(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        results.check_writable(blocked / "inside")


@contextmanager
def files_end_at(most: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes: the system refuses the write, as a full disk does.

    For as short as can be: the limit holds for the log that pytest may be writing, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 40])
def test_a_full_disk_costs_the_row_but_not_the_file(room: int, tmp_path: Path) -> None:
    """With no room at all, and with room for the beginning of a row."""
    results.append_row(tmp_path, row())
    before = (tmp_path / results.ROWS).read_bytes()
    with pytest.raises(UsageError, match="cannot be written: "), files_end_at(len(before) + room):
        results.append_row(tmp_path, row())
    assert (tmp_path / results.ROWS).read_bytes() == before


def _append_many(folder: Path, start: int) -> None:
    for batch in range(start, start + 25):
        results.append_row(folder, row(Case(**{**vars(CASE), "batch_size": batch})))


def test_two_sweeps_into_one_folder_tear_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, s)) for s in (1, 101)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    batches = sorted(results.read_rows(tmp_path).requested_batch_size)
    assert batches == [*range(1, 26), *range(101, 126)]


def test_resume_skips_what_is_settled_here_and_nothing_else(tmp_path: Path) -> None:
    variants = {
        "done": CASE,
        "other batch": Case(**{**vars(CASE), "batch_size": 1}),
        "training": Case(**{**vars(CASE), "mode": "train"}),
    }
    results.append_row(tmp_path, row(variants["done"]))
    results.append_row(tmp_path, row(variants["training"], status="timeout"))
    settled = results.settled_cases(tmp_path, STAMP.env_id, STAMP.commit)
    keys = {name: results.identity_key(case) in settled for name, case in variants.items()}
    assert keys == {"done": True, "other batch": False, "training": False}
    assert not results.settled_cases(tmp_path, "another env", STAMP.commit)
    assert not results.settled_cases(tmp_path, STAMP.env_id, "another commit")


def test_a_ceiling_is_only_ever_raised(tmp_path: Path) -> None:
    for rate in ("0.4", "0.3", "0.5"):
        facts = {"cpu": "x", "ceiling_ieee_tflops": rate}
        results.record_environment(tmp_path, "env", facts)
    assert results.read_environments(tmp_path)["env"]["ceiling_ieee_tflops"] == "0.5"
    results.record_environment(tmp_path, "other", {"cpu": "y"})
    assert set(results.read_environments(tmp_path)) == {"env", "other"}


def test_cases_are_held_to_the_fastest_rate_ever_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a busy neighbour, the survey of this sweep sees a third of it."""
    found = {
        "device": "cpu", "facts": {"device_name": "x"}, "env_id": "env", "folder": "x",
        "commit": "1e5", "ceilings": {"ceiling_ieee_tflops": "0.1", "ceiling_copy_gb_s": "40"},
    }  # fmt: skip
    faster = {"ceiling_ieee_tflops": "0.3", "ceiling_copy_gb_s": "30", "ceiling_bf16_tflops": "1"}
    results.record_environment(tmp_path / "x", "env", faster)
    monkeypatch.setattr(session, "survey", lambda request, threads, ceilings: found)
    seen = []

    def measure(case: Case, options: Options, ceilings: dict[str, float]) -> Outcome:
        seen.append(ceilings)
        return Outcome("timeout", "not done")

    arguments = ["bench", "-m", "cifar_resnet20", "--backend", "eager", "-b", "1", "--device",
                 "cpu", "--channels-last", "--results", str(tmp_path), "--no-report"]  # fmt: skip
    session.bench_request(cli.parser().parse_args(arguments), measure)
    assert seen == [{"ceiling_ieee_tflops": 0.3, "ceiling_copy_gb_s": 40.0}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_gets_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="no permission to write"):
        results.append_row(tmp_path, row())
