"""The plan on a lent GPU, end to end, by a simulated clock: what is home when, whatever happens."""

import random
from pathlib import Path

import pandas as pd
import pytest

from resfuse.bench.records import results
from resfuse.bench.records.case import Case
from resfuse.bench.records.outcome import Outcome
from resfuse.tools.gpu_plan import plan_progress
from resfuse.tools.gpu_plan.archive import Places
from resfuse.tools.gpu_plan.plan_steps import STEPS
from resfuse.tools.gpu_plan.restore import restore
from simulated_gpu import CEILINGS, FACTS, Killed, SimulatedGpu

pytestmark = pytest.mark.slow

FOLDER = "a-simulated-h200"
HEADLINE = {("engine", 1), ("cudnn_fused", 1), ("engine", 256), ("cudnn_fused", 256)}
SECOND = {step.name for step in STEPS if step.part != "third"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose results folder knows the machine, with caches of its own."""
    for variable in ("RESFUSE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return known_machine(tmp_path / "results")


def known_machine(root: Path) -> Path:
    results.record_environment(root / FOLDER, "env", {**FACTS, **CEILINGS})
    (root / FOLDER / "NOTES.md").write_text("people's own words")
    return root


def rows_of(folder: Path) -> pd.DataFrame:
    return results.read_rows(folder)


def passed(rows: pd.DataFrame) -> set[tuple[str, int]]:
    """(backend, batch) of ResNet-50's rows beside eager."""
    good = rows[(rows.status == "pass") & rows.baseline.str.startswith("eager")]
    good = good[good.model == "resnet50"]
    return set(zip(good.backend, good.requested_batch_size.astype(int), strict=True))


def beside(rows: pd.DataFrame) -> set[int]:
    good = rows[(rows.status == "pass") & (rows.baseline == "cudnn_fused channels_last")]
    return set(good.requested_batch_size.astype(int))


def home(file: Path, to: Path) -> pd.DataFrame:
    """The rows that an archive brings to an empty clone."""
    restore(file, Places(to / "results", to / "timings", to / "inductor"))
    folder = to / "results" / FOLDER
    return rows_of(folder) if results.has_rows(folder) else pd.DataFrame(columns=["status"])


def test_the_headline_is_home_after_300_s_and_the_compilers_after_540(
    root: Path, tmp_path: Path
) -> None:
    gpu = SimulatedGpu(cut_at=300, cut_by=Killed, archive=tmp_path / "plan.tar.xz")
    gpu.run(root, "--part", "first")
    rows = home(gpu.killed, tmp_path / "a")
    assert passed(rows) >= HEADLINE
    assert beside(rows) == {1, 256}

    gpu = SimulatedGpu(archive=tmp_path / "plan.tar.xz")
    code, _ = gpu.run(root, "--part", "first")
    assert code == 0
    assert gpu.now <= 540
    rows = home(gpu.archive or Path(), tmp_path / "b")
    compilers = {("compiled", 1), ("compiled", 256), ("compiled_max_autotune", 256)}
    assert passed(rows) == HEADLINE | compilers | {("fused", 1), ("fused", 256)}
    text = (tmp_path / "b/results" / FOLDER / "engine-resnet50-float16-b256.txt").read_text()
    assert "a table of segments" in text
    assert (tmp_path / "b/results" / FOLDER / "probe.json").exists()


def test_a_machine_that_nobody_knows_costs_its_ceilings_only(tmp_path: Path, root: Path) -> None:
    gpu = SimulatedGpu(cut_at=300)
    gpu.run(tmp_path / "elsewhere", "--part", "first")
    assert passed(rows_of(tmp_path / "elsewhere" / FOLDER)) >= HEADLINE


def test_commands_follow_each_other_until_all_is_done(root: Path, tmp_path: Path) -> None:
    gpu = SimulatedGpu(archive=tmp_path / "plan.tar.xz")
    gpu.run(root, "--part", "first")
    _, said = gpu.run(root, "--part", "second", "--resume", "--budget", "240")
    assert "depth-256: left for later" not in said.split("autotune-1")[0]  # worth comes first
    for _ in range(8):
        if "Not done" in said:
            code, said = gpu.run(root, "--resume")
    assert code == 0
    assert "Not done" not in said
    folder = root / FOLDER
    ended = plan_progress.load(folder, "env", "commit").ended
    assert ended == {step.name: plan_progress.DONE for step in STEPS}
    settled = [case for _, case, _ in gpu.ended]
    assert len(settled) == len(set(settled))
    rows = rows_of(folder)
    assert set(rows[rows.backend == "onnxrt"].status) == {"unavailable"}
    assert not any(case.backend == "onnxrt" for case in gpu.begun)  # it was not asked twice


def cuts() -> list[tuple[float, type[BaseException]]]:
    chance = random.Random(17)
    kinds = (KeyboardInterrupt, SystemExit, Killed)
    return [(round(chance.uniform(1, 505), 1), kinds[i % 3]) for i in range(20)]


@pytest.mark.parametrize(("moment", "kind"), cuts())
def test_cut_off_at_any_moment_the_rows_are_home_and_the_next_command_goes_on(
    moment: float, kind: type[BaseException], root: Path, tmp_path: Path
) -> None:
    gpu = SimulatedGpu(cut_at=moment, cut_by=kind, archive=tmp_path / "plan.tar.xz")
    gpu.run(root, "--part", "first")
    assert gpu.now == moment
    file = gpu.killed if kind is Killed else tmp_path / "plan.tar.xz"
    settled = {case for _, case, _ in gpu.ended}
    assert file.exists() or not settled
    if file.exists():
        assert file.stat().st_size < 30 << 20
        rows = home(file, tmp_path / "home")
        assert list(rows.status) == ["pass"] * len(settled)
        if settled:
            assert len(rows_of(root / FOLDER)) == len(settled)

    gpu.cut_at = float("inf")
    elsewhere = known_machine(tmp_path / "fresh")
    flags = ["--from", str(file)] if file.exists() else []
    code, said = gpu.run(elsewhere, "--part", "second", *flags)
    for _ in range(5):
        if "Not done" in said:
            code, said = gpu.run(elsewhere, "--part", "second", "--resume")
    assert code == 0
    assert "Not done" not in said
    measured = [case for _, case, _ in gpu.ended]
    assert len(measured) == len(set(measured))
    ended = plan_progress.load(elsewhere / FOLDER, "env", "commit").ended
    assert {name for name, how in ended.items() if how == plan_progress.DONE} == SECOND
    assert (elsewhere / FOLDER / "NOTES.md").read_text() == "people's own words"


def engine_at(case: Case, batch_size: int) -> bool:
    headline = case.model == "resnet50" and case.baseline == "eager"
    return headline and (case.backend, case.batch_size) == ("engine", batch_size)


def test_an_engine_that_broke_the_gpu_is_built_again_once_and_its_row_says_so(
    root: Path,
) -> None:
    def trouble(case: Case, begun: int) -> Outcome | None:
        if engine_at(case, 256) and begun == 0:
            return Outcome("fail_to_run", "BrokenDevice: tile 3 broke the GPU", again=True)
        return None

    gpu = SimulatedGpu(trouble=trouble)
    code, said = gpu.run(root, "--part", "first")
    assert code == 0
    assert "tile 3 broke the GPU; tried once more in a new process" in said
    rows = rows_of(root / FOLDER)
    [row] = rows[(rows.backend == "engine") & (rows.requested_batch_size == 256)
                 & rows.baseline.str.startswith("eager")].to_dict("records")  # fmt: skip
    assert row["status"] == "pass"
    assert row["error"] == "a first process failed: BrokenDevice: tile 3 broke the GPU"
    assert passed(rows) >= HEADLINE | {("compiled", 1), ("compiled", 256)}


def test_what_always_fails_costs_itself_and_comes_last_the_next_time(root: Path) -> None:
    def trouble(case: Case, begun: int) -> Outcome | None:
        bad = engine_at(case, 256)
        return Outcome("fail_to_run", "BrokenDevice: again", again=True) if bad else None

    gpu = SimulatedGpu(trouble=trouble)
    code, _ = gpu.run(root, "--part", "first")
    assert code == 1
    assert passed(rows_of(root / FOLDER)) >= HEADLINE - {("engine", 256)} | {("compiled", 256)}
    assert sum(engine_at(case, 256) for case in gpu.begun) == 2
    gpu.begun.clear()
    gpu.run(root, "--part", "second", "--resume", "--budget", "240")
    first = gpu.begun[0]
    assert (first.backend, first.batch_size) == ("compiled_max_autotune", 256)


def test_too_little_memory_for_256_leaves_batch_1_whole(root: Path) -> None:
    def trouble(case: Case, begun: int) -> Outcome | None:
        return Outcome("oom", "CUDA out of memory") if case.batch_size == 256 else None

    gpu = SimulatedGpu(trouble=trouble)
    code, _ = gpu.run(root, "--part", "first")
    assert code == 0
    rows = rows_of(root / FOLDER)
    assert passed(rows) == {(name, 1) for name in ("engine", "cudnn_fused", "fused", "compiled")}
    assert beside(rows) == {1}
    assert set(rows[rows.requested_batch_size == 256].status) == {"oom"}


def test_an_engine_twice_as_slow_still_leaves_the_headline_in_time(root: Path) -> None:
    gpu = SimulatedGpu()
    for size in (1, 256):
        gpu.seconds["engine", size] *= 2
    gpu.run(root, "--part", "first")
    assert max(at for at, case, _ in gpu.ended if (case.backend, case.batch_size) in HEADLINE
               and case.baseline == "eager") <= 300  # fmt: skip
    assert passed(rows_of(root / FOLDER)) >= HEADLINE | {("compiled", 256), ("fused", 1)}
    gpu.run(root, "--part", "second", "--resume")
    assert ("compiled_max_autotune", 256) in passed(rows_of(root / FOLDER))


def test_a_backend_that_hangs_costs_its_bound(root: Path) -> None:
    gpu = SimulatedGpu()
    gpu.seconds["cudnn_fused", 1] = 1e9
    code, _ = gpu.run(root, "--part", "first")
    assert code == 1
    rows = rows_of(root / FOLDER)
    assert next(iter(rows.status)) == "timeout"
    assert passed(rows) >= HEADLINE - {("cudnn_fused", 1)} | {("compiled", 256)}


def test_wrong_answers_are_settled_for_these_sources_alone(root: Path) -> None:
    def trouble(case: Case, begun: int) -> Outcome | None:
        bad = case.backend == "cudnn_fused"
        return Outcome("fail_accuracy", "relative error nan") if bad else None

    gpu = SimulatedGpu(trouble=trouble)
    gpu.run(root, "--part", "first")
    folder = root / FOLDER
    of_peer = [case for case in gpu.begun if case.backend == "cudnn_fused"]
    settled = results.settled_cases(folder, "env", "commit")
    mended = results.settled_cases(folder, "env", "the next commit")
    assert all(results.identity_key(case) in settled for case in of_peer)
    assert mended == set()
    assert plan_progress.load(folder, "env", "the next commit").ended == {}


def test_kernels_of_another_commit_cost_only_time(root: Path, tmp_path: Path) -> None:
    gpu = SimulatedGpu(cut_at=300)
    _, said = gpu.run(root, "--part", "first", "--carried", str(tmp_path / "old.tar.xz"))
    assert "was made for other kernels" in said
    assert passed(rows_of(root / FOLDER)) >= HEADLINE


def test_an_old_assembler_is_said_and_costs_nothing_else(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "ptxas"
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.9, V12.9.86\n")
    old.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(old))
    gpu = SimulatedGpu(cut_at=300)
    _, said = gpu.run(root, "--part", "first")
    assert "ptxas 12.9.86 of TRITON_PTXAS_PATH, which may miscompile for Hopper" in said
    assert "leaves whole tails of blocks out" in said
    assert passed(rows_of(root / FOLDER)) >= HEADLINE


def test_an_archive_that_cannot_be_written_costs_no_row(root: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "plan.tar.xz"
    gpu = SimulatedGpu(archive=blocked)
    blocked.with_name("plan.tar.xz.tmp").mkdir()  # where it is written first
    code, said = gpu.run(root, "--part", "first")
    assert code == 0
    assert "cannot be written" in said
    assert passed(rows_of(root / FOLDER)) >= HEADLINE
