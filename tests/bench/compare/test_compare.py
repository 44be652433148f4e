"""`resfuse compare`: calls a slowdown a regression where one can tell, and nowhere else."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from resfuse.bench.cli import main
from resfuse.bench.common.errors import LeftOutWarning
from resfuse.bench.compare import verdict
from resfuse.bench.compare.side import Key, Run, Runs
from resfuse.bench.records import results
from resfuse.bench.records.case import Case
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Stamp

CASE = Case("resnet18", "fused", "inference", "cpu", "float32", "channels_last", 8, 224)
OTHER = replace(CASE, model="resnet50")
BASELINE = replace(CASE, backend="eager", memory_format="contiguous")
STAMP = Stamp("some CPU, 2 cores", "env-a", "c1", "2026-01-02T03:04:05+00:00")
FACTS = {"torch": "2.14.1", "threads": "2", "ceiling_copy_gb_s": "12"}
# Speed-ups of a baseline against itself: 1 % of noise between runs.
QUIET = (1.01, 0.99, 1.012, 0.988, 0.99, 1.01)

Said = tuple[int, str]


def add(folder: Path, case: Case, *speedups: float, stamp: Stamp = STAMP, **metrics: float) -> None:
    """A row for each speed-up, taken a second apart."""
    for speedup in speedups:
        taken = len(results.read_rows(folder)) if results.has_rows(folder) else 0
        values = {
            "p50_ms": 20 / speedup, "baseline_p50_ms": 20.0, "speedup": speedup,
            "speedup_ci_low": 0.995 * speedup, "speedup_ci_high": 1.005 * speedup, **metrics,
        }  # fmt: skip
        stamp = replace(stamp, timestamp=f"2026-01-02T03:{taken:02}:05+00:00")
        results.append_row(
            folder, CASES.record(case.identity(), Outcome("pass", "", values), stamp)
        )
    results.record_environment(folder, stamp.env_id, FACTS)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    add(tmp_path / "a", BASELINE, *QUIET)
    add(tmp_path / "a", CASE, 1.5)
    return tmp_path / "a"


@pytest.fixture
def after(tmp_path: Path) -> Path:
    add(tmp_path / "b", BASELINE, 1.004, stamp=replace(STAMP, commit="c2"))
    return tmp_path / "b"


@pytest.fixture
def compare(before: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`compare(*flags)`: the exit code and what was said, in either stream."""

    def run(*flags: str) -> Said:
        code = main(["compare", str(before), str(after), *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_a_planted_slowdown_is_a_regression(after: Path, compare: Callable[..., Said]) -> None:
    add(after, CASE, 1.5 / 1.1)
    code, said = compare()
    assert code == 1
    line = next(line for line in said.splitlines() if "resnet18 fused channels_last" in line)
    assert line.split()[6:10] == ["1.50x", "1.36x", "1.100", "[1.064,"]
    assert line.rstrip().endswith("REGRESSION, slower")
    assert "Regression: 1 of 1 case" in said


@pytest.mark.parametrize(
    ("speedup", "said"),
    [
        (1.5, "not significant"),
        (1.495, "not significant"),
        (1.5 / 1.04, "slower"),  # significant, and within what is allowed
        (1.65, "faster"),
    ],
)
def test_what_is_no_regression(
    speedup: float, said: str, after: Path, compare: Callable[..., Said]
) -> None:
    add(after, CASE, speedup)
    code, out = compare()
    assert code == 0
    line = next(line for line in out.splitlines() if "resnet18 fused channels_last" in line)
    assert line.rstrip().endswith(f"]  {said}")
    assert "REGRESSION" not in out
    assert "No regression beyond 5 % in 1 case." in out


def test_the_threshold_is_the_users(after: Path, compare: Callable[..., Said]) -> None:
    add(after, CASE, 1.5 / 1.04)
    assert compare("--fail-above", "3%")[0] == 1
    assert compare("--fail-above", "12.5%")[0] == 0


def test_a_slowdown_within_the_noise_is_none(before: Path, compare: Callable[..., Said]) -> None:
    """The same 10 % as above, where runs differ by as much: it says what could have been seen."""
    add(before, BASELINE, 0.9, 1.11, 0.88)
    add(before.parent / "b", CASE, 1.5 / 1.1)
    code, said = compare()
    assert code == 0
    assert "not significant" in said
    least = float(said.split("A slowdown of ")[1].split(" %")[0])
    assert 15 < least < 25


def test_a_case_that_fails_where_it_passed(after: Path, compare: Callable[..., Said]) -> None:
    stamp = replace(STAMP, commit="c2")
    for status, error in (("pass", ""), ("fail_accuracy", "relative error 0.3")):
        metrics = {"speedup": 1.5, "speedup_ci_low": 1.49, "speedup_ci_high": 1.51}
        row = CASES.record(
            CASE.identity(), Outcome(status, error, metrics if status == "pass" else {}), stamp
        )
        results.append_row(after, row)
    code, said = compare()
    assert code == 1
    assert "1 of 2 runs in B failed: fail_accuracy: relative error 0.3" in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch_size": 1}, "batch size 8 against 1"),
        ({"precision": "bfloat16"}, "precision float32 against bfloat16 (1 case)"),
        ({"precision": "tf32"}, "precision float32 against tf32"),
        ({"img_size": 128}, "image size 224 against 128"),
        ({"memory_format": "contiguous"}, "memory format channels_last against contiguous"),
        ({"baseline": "compiled"}, "baseline eager contiguous against compiled contiguous"),
        ({"weights": "pretrained"}, "weights seeded against pretrained"),
        ({"mode": "train"}, "mode inference against train"),
        ({"model": "resnet34"}, "not measured on the other side"),
    ],
)
def test_other_cases_are_refused_with_the_reason(
    change: dict, reason: str, after: Path, compare: Callable[..., Said]
) -> None:
    add(after, replace(CASE, **change), 1.5)
    code, said = compare()
    assert code == 2
    assert said.startswith("resfuse: error: nothing in ")
    assert reason in said


def test_other_environments_are_refused_by_what_differs(
    before: Path, after: Path, compare: Callable[..., Said]
) -> None:
    add(after, CASE, 1.5, stamp=replace(STAMP, env_id="env-b"))
    facts = {"torch": "2.15.0", "threads": "2", "ceiling_copy_gb_s": "9"}
    results.record_environment(after, "env-b", facts)
    code, said = compare()
    assert code == 2
    assert "another environment: torch 2.14.1 against 2.15.0" in said
    assert "ceiling" not in said
    (after / results.ENVIRONMENTS).unlink()
    assert "no environments.csv beside the rows" in compare()[1]


def test_another_machine_is_refused(after: Path, compare: Callable[..., Said]) -> None:
    add(after, CASE, 1.5, stamp=Stamp("other CPU", "env-c", "c1", STAMP.timestamp))
    (after / results.ENVIRONMENTS).unlink()
    assert "another machine: some CPU, 2 cores against other CPU" in compare()[1]


def test_what_cannot_be_compared_does_not_keep_the_rest_back(
    before: Path, after: Path, compare: Callable[..., Said]
) -> None:
    add(before, OTHER, 1.2)
    add(after, CASE, 1.5)
    add(after, replace(OTHER, batch_size=1), 1.2)
    code, said = compare()
    assert code == 0
    assert "Not compared: batch size 8 against 1 (1 case)." in said


def test_without_any_noise_there_is_no_verdict(tmp_path: Path) -> None:
    for side, speedup in (("a", 1.5), ("b", 1.2)):
        add(tmp_path / side, CASE, speedup)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    add(tmp_path / "b", CASE, 1.21, stamp=replace(STAMP, commit="c1"))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1


def test_copies_of_a_row_are_no_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file put together from itself would seem to have no noise at all."""
    for side in ("a", "b"):
        add(tmp_path / side, CASE, 1.5, stamp=replace(STAMP, commit=side))
        path = tmp_path / side / results.ROWS
        path.write_text(path.read_text() + path.read_text().split("\n", 1)[1])
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "do not tell the noise between runs" in capsys.readouterr().err


def test_a_file_that_grew_is_compared_by_what_is_new(
    before: Path, after: Path, compare: Callable[..., Said]
) -> None:
    for side, speedup in (("c1", 1.5), ("c2", 1.3)):
        add(after, CASE, speedup, stamp=replace(STAMP, commit=side))
    table = pd.concat([pd.read_csv(f / results.ROWS, dtype=str) for f in (before, after)])
    table.to_csv(after / results.ROWS, index=False)
    code, said = compare()
    assert code == 1
    assert f"7 rows of {after} in {before}, too: counted there alone." in said
    assert "1 of 3 rows left out: of an older commit" in said
    assert main(["compare", str(before), str(before)]) == 0


@pytest.mark.parametrize("value", ["-1.5", "fast"])
def test_a_row_whose_speed_is_no_number_is_left_out(
    value: str, after: Path, compare: Callable[..., Said]
) -> None:
    add(after, CASE, 1.125)
    path = after / results.ROWS
    path.write_text(path.read_text().replace(",1.125,", f",{value},"))
    with pytest.warns(LeftOutWarning, match=f"left out line 3: '{value}' in column speedup"):
        assert compare()[0] == 2


@pytest.mark.parametrize("value", ["", "nan", "inf", "0"])
def test_speeds_that_are_none(value: str, after: Path, compare: Callable[..., Said]) -> None:
    add(after, CASE, 1.125)
    path = after / results.ROWS
    path.write_text(path.read_text().replace(",1.125,", f",{value},"))
    code, said = compare()
    assert code == 2
    assert "no usable speed-up in B (1 case)" in said


def test_columns_are_known_by_name(after: Path, compare: Callable[..., Said]) -> None:
    """Reordered, with a foreign one, and without a metric that came later."""
    add(after, CASE, 1.5 / 1.1)
    path = after / results.ROWS
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table[sorted(table.columns, reverse=True)].drop(columns=["p90_ms", "throttle"])
    table.insert(3, "a metric of tomorrow", "7")
    table.to_csv(path, index=False)
    assert compare()[0] == 1


def test_files_that_cannot_be_read_get_a_sentence(
    before: Path, after: Path, compare: Callable[..., Said]
) -> None:
    add(after, CASE, 1.5)
    path = after / results.ROWS
    whole = path.read_text()
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.drop(columns=["precision", "env_id"]).to_csv(path, index=False)
    assert "lacks the columns precision, env_id" in compare()[1]
    table.assign(schema_version="2").to_csv(path, index=False)
    code, said = compare()
    assert code == 2
    assert (
        "was written by a newer resfuse (schema_version 2); this one reads versions up to 1" in said
    )
    path.write_text(whole + "a,row,with,far,too" + ",many" * 200 + "\n")
    with pytest.warns(LeftOutWarning, match=r"rows\.csv: left out line 4: 205 cells for \d+ col"):
        assert compare()[0] == 0
    path.write_bytes(whole.encode() + b"\xff\n")
    assert "cannot be read as CSV" in compare()[1]
    assert main(["compare", str(before / "none.csv"), str(after)]) == 2


@pytest.mark.parametrize("text", ["5", "0%", "-3%", "many%", "nan%", "%"])
def test_thresholds_that_are_none(text: str, compare: Callable[..., Said]) -> None:
    code, said = compare(f"--fail-above={text}")
    assert code == 2
    assert f"--fail-above: '{text}'; accepted: percentages above 0%" in said


def test_rows_that_something_disturbed_are_told(after: Path, compare: Callable[..., Said]) -> None:
    add(after, CASE, 1.5, throttle="other processes", baseline_p50_ms=30.0)
    said = compare()[1]
    assert "1 of 2 rows measured while something slowed the device" in said
    assert "The baselines themselves took 50 % longer in B" in said


def key(number: int, backend: str = "fused") -> Key:
    size = str(number)
    return Key("m", backend, "inference", "contiguous", "seeded", "bundled", "eager contiguous",
               size, "1", "float32", "ieee", "cpu", "env")  # fmt: skip


def runs(values: Sequence[float]) -> Runs:
    return Runs("c", [Run(float(value), 0.002, 10.0) for value in values])


def simulate(
    rng: np.random.Generator, slowdown: float, repeats: int, baselines: int, noise: Sequence[float]
) -> verdict.Verdict:
    """Two sweeps over as many cases as `noise` has standard deviations; the first is slowed."""
    sides: list[dict[Key, Runs]] = [{}, {}]
    for at, side in enumerate(sides):
        for i, scale in enumerate(noise):
            slowed = math.log(1 + slowdown) if i == at - 1 == 0 else 0.0
            side[key(i)] = runs(rng.normal(0.4 - slowed, scale, repeats))
        side[key(0, "eager")] = runs(rng.normal(0, noise[0], baselines))
    pairs = {name: (sides[0][name], sides[1][name]) for name in map(key, range(len(noise)))}
    every = [item for side in sides for item in side.items()]
    return verdict.judge(pairs, verdict.noise(every))


@pytest.mark.parametrize(
    ("repeats", "baselines", "noise"),
    [
        (1, 2, [0.03]),  # a single row a side, four baselines: the least there is
        (1, 4, [0.05] * 12),
        (3, 0, [0.05] * 12),
        (3, 4, [0.02] * 11 + [0.08]),  # one case far noisier than those the noise is known from
    ],
)
def test_false_alarms_are_rare(repeats: int, baselines: int, noise: list[float]) -> None:
    """400 comparisons of equals: at most 5 % may be flagged, and what chance adds to that."""
    rng = np.random.default_rng(3)
    flagged = sum(
        simulate(rng, 0.0, repeats, baselines, noise).regression for _ in range(400)
    )  # fmt: skip
    assert flagged / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize(
    ("repeats", "baselines", "noise"), [(1, 4, [0.02]), (3, 2, [0.02] * 12), (3, 0, [0.03])]
)
def test_a_slowdown_of_ten_percent_is_seen(
    repeats: int, baselines: int, noise: list[float]
) -> None:
    rng = np.random.default_rng(4)
    seen = [simulate(rng, 0.1, repeats, baselines, noise) for _ in range(200)]
    assert sum(one.cases[0].regression for one in seen) / 200 >= 0.9


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        change = simulate(rng, 0.1, 2, 3, [0.03]).cases[0].change
        assert change is not None
        low, high = change.interval
        covered += low <= 1.1 <= high
    assert 0.92 <= covered / 300 <= 0.98


def test_holm_against_its_own_example() -> None:
    """Four tests by hand: 4 x 0.005, 3 x 0.011, then never below what came before."""
    assert verdict._holm([0.011, 0.04, 0.005, 0.03]) == pytest.approx([0.033, 0.06, 0.02, 0.06])


def test_times_that_differ_by_any_factor_have_an_interval() -> None:
    change = verdict.Change(log_ratio=0.0, error=1e6, degrees=3)
    assert change.interval == (0.0, math.inf) and change.visible(4) == math.inf
    assert verdict.Change(1e6, 1.0, 3).ratio == math.inf
