"""`resfuse layers`: convolutions beside the whole network, from rows; and bad input."""

import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from resfuse.bench.cli import main
from resfuse.bench.layers import layer_sweep, measure_layer
from resfuse.bench.layers.layers_table import notes, table
from resfuse.bench.measuring import measure_case as whole
from resfuse.bench.records import results
from resfuse.bench.records.layer_row import SHEET
from resfuse.bench.report.data.workload import KernelResult, Workload
from resfuse.bench.report.tables.reconcile import Reconciled
from resfuse.bench.running import sweep as whole_sweep

pytestmark = pytest.mark.slow


def timed(shape: str, provider: str, count: int, ms: float, error: float = 1e-7) -> KernelResult:
    numbers = {"p50_ms": ms, "rel_l2_err": error, "sol_pct": 50.0}
    return KernelResult(shape, "conv1", provider, count, "pass", "", "c", numbers)


RESULTS = (
    timed("3x3", "eager", 3, 2.0), timed("3x3", "fused", 3, 1.0, 4e-7),
    timed("1x1", "eager", 2, 1.0), timed("1x1", "fused", 2, 3.0, 2e-7),
    KernelResult("3x3", "conv1", "cudnn", 3, "unavailable", "needs a GPU", "c", {}),
)  # fmt: skip
WORKLOAD = Workload("a CPU", "tiny", 32, 8, "float32", "ieee", RESULTS)
WHOLE = [Reconciled("eager", "eager", 8.0, 10.0), Reconciled("fused", "fused", 9.0, 8.0)]


def cells(workload: Workload, reconciled: list[Reconciled]) -> dict[str, list[str]]:
    """The table's lines as words, keyed by the first."""
    out = io.StringIO()
    Console(file=out, width=200).print(table(workload, reconciled))
    lines = [line.split("  ") for line in out.getvalue().splitlines()]
    words = [[word.strip() for word in line if word.strip()] for line in lines]
    return {line[0]: line[1:] for line in words if line}


def test_sums_whole_networks_and_the_rest() -> None:
    """3 x 2 + 2 x 1 ms of eager in a network of 10: 2 are left; the fastest's sum is 5 ms."""
    found = cells(WORKLOAD, WHOLE)
    assert found["3x3"] == ["conv1", "3", "2.00", "1.00", "fused", "60.0", "50.0", "4.00e-7"]
    assert found["1x1"] == ["conv1", "2", "1.00", "3.00", "eager", "40.0", "50.0", "2.00e-7"]
    assert found["sum"] == ["5", "8.00", "9.00", "5.00 ms"]
    assert found["whole network"] == ["10.0", "8.00"]
    assert found["rest"] == ["2.00", "-1.00"]
    assert found["rest, % of the whole"] == ["20.0", "-12.5"]
    assert found["worst error vs fp64"] == ["1.00e-7", "4.00e-7"]


def test_what_is_missing_is_said_and_never_counted_as_nothing() -> None:
    failed = replace(RESULTS[1], status="fail_accuracy", error="error 1e-2", numbers={})
    workload = replace(WORKLOAD, results=(RESULTS[0], failed, *RESULTS[2:]))
    found = cells(workload, WHOLE[:1])
    assert found["3x3"][3] == "fail_accuracy"
    assert found["sum"][2] == "-" and found["whole network"] == ["10.0", "-"]
    told = "\n".join(notes(workload, WHOLE))
    assert "fused: fail_accuracy on 1 of 2: error 1e-2" in told
    assert "cudnn: unavailable on 1 of 2: needs a GPU" in told
    assert "A rest below zero" in told and "A rest below zero" not in "\n".join(notes(WORKLOAD, []))


def test_measures_appends_and_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it, but in this process: test_kernel_bench and test_sweep have the others."""

    def one(convolution, names, options, ceilings):  # type: ignore[no-untyped-def]
        return measure_layer.measure(convolution, names, options, ceilings, lambda event: None)[0]

    def network(case, options, ceilings):  # type: ignore[no-untyped-def]
        return whole.measure(case, options, ceilings, lambda event: None)[0]

    monkeypatch.setattr(layer_sweep, "run_convolution", one)
    monkeypatch.setattr(whole_sweep, "run_case", network)
    ask = ["--providers", "eager,fused,cudnn", "--rounds", "2", "--seconds", "0.05"]
    place = ["--device", "cpu", "--results", str(tmp_path)]
    assert main(["layers", "cifar_resnet20", "-b", "2", *ask, *place]) == 0
    (folder,) = tmp_path.iterdir()
    kernels, rows = results.read_rows(folder, SHEET), results.read_rows(folder)
    assert len(kernels) == 6 * 3 and set(kernels.requested_batch_size) == {2}
    assert list(rows.backend) == ["eager", "fused"] and set(rows.status) == {"pass"}
    said = capsys.readouterr().out
    (line,) = (one for one in said.splitlines() if one.startswith("sum"))
    mine = kernels[kernels.provider == "eager"]
    total = (mine.p50_ms * mine["count"]).sum()
    assert float(line.split()[2]) == pytest.approx(total, rel=0.01)
    (line,) = (one for one in said.splitlines() if one.startswith("whole network"))
    assert float(line.split()[2]) == pytest.approx(rows.p50_ms[0], rel=0.01)
    (line,) = (one for one in said.splitlines() if one.startswith("rest "))
    assert float(line.split()[1]) == pytest.approx(rows.p50_ms[0] - total, rel=0.02, abs=0.01)
    assert "cudnn: unavailable on 6 of 6" in said
    assert pd.notna(kernels[kernels.status == "pass"].floor_ms).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet81"], "argument MODEL: unknown name 'resnet81'; did you mean resnet18"),
        (["resnet*"], "argument MODEL: 'resnet*' stands for "),
        (["resnet18", "-b", "0"], "--batch-size: 0; accepted: whole numbers from 1"),
        (["resnet18", "-b", "1,8"], "--batch-size: '1,8' is not a whole number"),
        (["resnet18", "--precision", "fp8"], "--precision: unknown name 'fp8'"),
        (["resnet18", "--providers", "cudn"], "--providers: unknown name 'cudn'"),
        (["resnet18", "--img-size", "0"], "--img-size: 0; accepted"),
        (["resnet18", "--seconds", "nan"], "--seconds: 'nan'; accepted: numbers above 0"),
    ],
)
def test_bad_input(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", *arguments, "--results", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfuse: error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists()
