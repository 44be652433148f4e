"""`resfuse roofline`: predicted and measured tables, the CSV, and bad input in a sentence."""

from pathlib import Path

import pandas as pd
import pytest

from resfuse.bench.cli import main
from resfuse.bench.records import results
from resfuse.bench.records.case import Request
from resfuse.bench.running import survey
from resfuse.kernels.engine.cost.gpus import GPUS

pytestmark = pytest.mark.slow

ASK = ["roofline", "resnet18", "--img-size", "64", "-b", "1,8"]


def test_a_prediction_says_so_and_by_which_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "limits.csv"
    assert main([*ASK, "--gpu", "h200,l4", "--layers", "--csv", str(file)]) == 0
    said = capsys.readouterr().out
    for name in ("h200", "l4"):
        assert f"{GPUS[name].name}, float16: predicted. Nothing was run" in said
        assert GPUS[name].source in said
    assert "layer1.0.conv1 8x64x16x16 k64 3x3 relu" in said
    rows = pd.read_csv(file)
    assert set(rows.rates) == {"predicted"} and set(rows.device) == {"H200", "L4"}
    cuts, layers = rows[rows.layer.isna()], rows[rows.layer.notna()]
    assert len(cuts) == 2 * 2 * 5
    assert (cuts.images_per_s * cuts.floor_ms).tolist() == pytest.approx(cuts.batch_size * 1e3)
    one = cuts[(cuts.device == "L4") & (cuts.batch_size == 8) & (cuts.cut == "conv by conv")]
    own = layers[(layers.device == "L4") & (layers.batch_size == 8)]
    assert (own["count"] * own.floor_ms).sum() == pytest.approx(one.floor_ms.iloc[0])
    assert (own["count"] * own.gflop).sum() == pytest.approx(8 * one.gflop.iloc[0])
    assert own.share_pct.sum() == pytest.approx(100)
    assert (own.flop_per_byte * own.least_mb * 2**20).tolist() == pytest.approx(own.gflop * 1e9)
    slower = own.gflop / 121 > own.least_mb * 2**20 / 0.3e9
    assert (own.bound == slower.map({True: "FLOPs", False: "bytes"})).all()


def test_measured_rates_and_the_highest_on_record(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survey is real, but for the ceilings; a recorded one that is higher counts."""
    found = survey.survey(_request(), 0, ceilings=False)
    found["ceilings"] = {"ceiling_copy_gb_s": "10", "ceiling_ieee_tflops": "0.1"}
    monkeypatch.setattr(survey, "survey", lambda request, threads, ceilings: found)
    ask = [*ASK, "--device", "cpu", "--results", str(tmp_path)]
    assert main(ask) == 0
    said = capsys.readouterr().out
    assert "float32: measured rates. Seen on this device just now" in said
    assert "100 GFLOP/s in ieee and 10 GB/s" in said and "predicted" not in said
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / found["folder"]
    recorded = {"ceiling_copy_gb_s": "9", "ceiling_ieee_tflops": "0.2"}
    results.record_environment(folder, found["env_id"], recorded)
    assert main(ask) == 0
    said = capsys.readouterr().out
    assert "200 GFLOP/s in ieee and 10 GB/s" in said and str(folder) in said
    assert main([*ask, "--precision", "tf32"]) == 2
    assert "argument --precision: tf32 is no arithmetic of this cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet81"], "argument MODEL: unknown name 'resnet81'; did you mean resnet18"),
        ([], "required: MODEL"),
        (["resnet18", "--gpu", "h300"], "argument --gpu: unknown name 'h300'; did you mean h200"),
        (["resnet18", "--gpu", "v"], "known: a100, h100, h200, b200, l4, l40s, rtx4090, rtx5090, "),
        (["resnet18", "--gpu", "l4", "-b", "0"], "--batch-size: 0; accepted: whole numbers from 1"),
        (["resnet18", "--gpu", "l4", "--precision", "fp8"], "--precision: unknown name 'fp8'"),
        (["resnet18", "--gpu", "l4", "--img-size", "-3"], "--img-size: -3; accepted"),
        (["vgg19", "--gpu", "l4", "--img-size", "8"], "argument --img-size: vgg19 at 8 pixels: "),
        (["resnet18", "--gpu", "l4", "--device", "cpu"], "--device: not with --gpu"),
        (["resnet18", "--gpu", "l4", "--csv", "/no/such/file.csv"], "--csv: /no/such is no folder"),
        (["resnet18", "--device", "gpu"], "--device: 'gpu' cannot be used"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("resfuse: error: ") and said in error


def _request() -> Request:
    return Request(
        "quick", "cpu", ["resnet18"], ["eager"], [1], [], [], ["inference"], None, "eager",
        "contiguous", "seeded", "bundled",
    )  # fmt: skip
