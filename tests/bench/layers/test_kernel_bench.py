"""`resfuse kernels`: the convolutions of a network, and providers checked before they are timed."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import Resfuse, insert_after
from resfuse.bench.backends.providers import PROVIDERS, Provider
from resfuse.bench.backends.providers.layer import ConvRelu
from resfuse.bench.cli import main
from resfuse.bench.layers import layer_sweep, measure_layer
from resfuse.bench.layers.layer_floor import floor
from resfuse.bench.measuring import measure_case as whole
from resfuse.bench.records import results
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.convolutions import Convolution, convolutions
from resfuse.bench.records.layer_row import SHEET, asked
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Stamp
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of

pytestmark = pytest.mark.slow

PROBLEM = ConvProblem(
    2, 16, 20, 20, k=24, r=3, s=3, geometry=Geometry(padding=(1, 1)), dtypes=dtypes_of("ieee")
)
CONVOLUTION = Convolution("tiny", 20, "cpu", "float32", "0", 1, PROBLEM)
OPTIONS = Options(seconds=0, min_rounds=4, max_rounds=4)
HERE = ("eager", "eager_channels_last", "fused", "onednn")
STAMP = Stamp("some CPU", "0123456789", "1e5", "2026-01-02T03:04:05+00:00")


def measured(*providers: str, problem: ConvProblem = PROBLEM) -> dict[str, Outcome]:
    convolution = replace(CONVOLUTION, problem=problem)
    return measure_layer.measure(convolution, providers, OPTIONS, {}, lambda event: None)[0]


@pytest.mark.parametrize(
    ("model", "distinct", "total"), [("resnet18", 11, 20), ("resnet50", 23, 53)]
)
def test_every_convolution_is_found_and_counted(model: str, distinct: int, total: int) -> None:
    """Their MACs are the network's, but for the classifier's."""
    case = Case(model, "eager", "inference", "cpu", "float32", "contiguous", 1, 224)
    found = convolutions(case)
    assert (len(found), sum(one.count for one in found)) == (distinct, total)
    assert len({one.shape for one in found}) == distinct
    features = {"resnet18": 512, "resnet50": 2048}[model]
    macs = sum(one.count * one.problem.macs for one in found)
    assert macs == whole.cost_of(case).macs - 1000 * features


def test_a_convolution_survives_the_pipe_to_the_subprocess() -> None:
    assert Convolution.from_plain(json.loads(json.dumps(CONVOLUTION.to_plain()))) == CONVOLUTION


def test_a_shape_tells_unusual_padding() -> None:
    assert CONVOLUTION.shape == "2x16x20x20 k24 3x3"
    unpadded = replace(
        CONVOLUTION, problem=replace(PROBLEM, geometry=PROBLEM.geometry._replace(padding=(0, 0)))
    )
    assert unpadded.shape == "2x16x20x20 k24 3x3 pad 0"


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        replace(
            PROBLEM,
            n=1,
            c=3,
            k=8,
            r=7,
            s=7,
            geometry=PROBLEM.geometry._replace(stride=(2, 2), padding=(3, 3)),
        ),  # a stem
        replace(
            PROBLEM, r=1, s=1, geometry=PROBLEM.geometry._replace(stride=(2, 2), padding=(0, 0))
        ),  # a projection
        replace(
            PROBLEM, geometry=PROBLEM.geometry._replace(padding=(2, 2), dilation=(2, 2), groups=4)
        ),  # ResNeXt, dilated
        replace(PROBLEM, dtypes=dtypes_of("bf16")),
    ],
    ids=ConvProblem.label,
)
def test_the_providers_are_right_and_timed(problem: ConvProblem) -> None:
    found = measured(*HERE, problem=problem)
    for name in HERE:
        if name in ("fused", "onednn") and found[name].status == "unavailable":
            pytest.skip(found[name].error)  # a CPU without bf16
        assert found[name].status == "pass", found[name].error
        metrics = found[name].metrics
        assert metrics["rounds"] == 4
        assert metrics["gflop_per_s"] == pytest.approx(problem.flops / metrics["p50_ms"] / 1e6)
        assert metrics["speedup_ci_low"] <= metrics["speedup"] <= metrics["speedup_ci_high"]
        assert metrics["rel_l2_err"] < (1e-6 if problem.math_mode == "ieee" else 1e-2)


def test_the_compiled_layer_is_right() -> None:
    assert measured("compiled")["compiled"].status == "pass"


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can run here")
def test_what_needs_a_gpu_says_so() -> None:
    found = measured("cudnn", "fused_conv1x1", "fused_split_k")
    assert {outcome.status for outcome in found.values()} == {"unavailable"}
    assert "NVIDIA GPU" in found["cudnn"].error
    assert "need a GPU" in found["fused_split_k"].error


def no_relu(layer: ConvRelu, example: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(layer.conv)


def no_bias(layer: ConvRelu, example: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(lambda x: F.relu(F.conv2d(x, layer.conv.weight, padding=1)))


def half(layer: ConvRelu, example: Tensor) -> Callable[[Tensor], Tensor]:
    layer.bfloat16()
    return torch.inference_mode()(lambda x: layer(x.bfloat16()).float())


def remembers(layer: ConvRelu, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Honest while it is being checked, then hands out what it found last."""
    calls: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        if len(calls) < 4:
            calls.append(layer(x))
        return calls[-1].clone()

    return torch.inference_mode()(run)


def plant(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    build = f"test_kernel_bench:{function}"
    monkeypatch.setitem(PROVIDERS, "planted", Provider(build, "planted", "contiguous"))


@pytest.mark.parametrize("wrong", ["no_relu", "no_bias", "half"])
def test_a_wrong_provider_fails_alone(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong)
    found = measured("planted", "fused")
    assert (found["planted"].status, found["fused"].status) == ("fail_accuracy", "pass")
    assert "against fp64 before timing" in found["planted"].error
    assert "p50_ms" not in found["planted"].metrics


def test_wrong_answers_under_the_clock_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with others, no provider has a number then; the sweep tries each alone."""
    plant(monkeypatch, "remembers")
    found = measured("planted", "eager")
    assert {outcome.status for outcome in found.values()} == {"fail_accuracy"}
    assert "in a timed round" in found["planted"].error
    monkeypatch.setattr(
        layer_sweep, "run_convolution", lambda c, names, o, ceilings: measured(*names)
    )
    outcomes = layer_sweep._measure(CONVOLUTION, ("planted", "eager"), set(), OPTIONS, {})
    assert (outcomes["planted"].status, outcomes["eager"].status) == ("fail_accuracy", "pass")


def test_who_breaks_the_process_has_its_own_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(convolution, names, options, ceilings):  # type: ignore[no-untyped-def]
        asked.append(list(names))
        crashed = Outcome("fail_to_run", "the subprocess was killed by SIGABRT")
        return dict.fromkeys(names, crashed if "bad" in names else Outcome("pass"))

    monkeypatch.setattr(layer_sweep, "run_convolution", run)
    loners: set[str] = set()
    for _ in range(2):
        found = layer_sweep._measure(CONVOLUTION, ("eager", "bad", "fused"), loners, OPTIONS, {})
        assert [found[n].status for n in ("eager", "bad", "fused")] == [
            "pass", "fail_to_run", "pass",
        ]  # fmt: skip
    first = [["eager", "bad", "fused"], ["eager"], ["bad"], ["fused"]]
    assert asked == [*first, ["eager", "fused"], ["bad"]]


def test_faster_than_the_arithmetic_fails() -> None:
    """Ceilings a million times too low make any time look impossible, as a broken timer would."""
    low = {"ceiling_ieee_tflops": 1e-7, "ceiling_copy_gb_s": 10.0}
    found = measure_layer.measure(CONVOLUTION, ["fused"], OPTIONS, low, lambda event: None)[0]
    assert found["fused"].status == "fail_to_run"
    assert "faster than possible" in found["fused"].error


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    ceilings = {"ceiling_ieee_tflops": 1.0, "ceiling_copy_gb_s": 1.0}
    least = floor(PROBLEM, ceilings)
    assert least is not None
    # x 2*16*400, w 24*16*9, b 24, y 2*24*400 numbers of four bytes
    assert least.ms == pytest.approx(4 * (12800 + 3456 + 24 + 19200) / 1e6)
    assert least.possible_ms == pytest.approx(PROBLEM.flops / 1e9 / 4)  # Winograd granted
    assert floor(PROBLEM, {}) is None


def test_faster_than_reading_from_memory_fails_where_no_cache_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy rate a million times too low: impossible on a GPU, whose cache was emptied; on a CPU
    the inputs may have stayed in one."""
    low = {"ceiling_ieee_tflops": 1e6, "ceiling_copy_gb_s": 1e-6}
    cold, warm = floor(PROBLEM, low, cold=True), floor(PROBLEM, low)
    assert cold is not None and warm is not None
    read = 4 * (12800 + 3456 + 24)
    assert cold.possible_ms == pytest.approx(read / 1e-6 / 1e6 / 1.25)
    assert warm.possible_ms < 1e-6 < cold.possible_ms < cold.ms == warm.ms
    assert measure_layer.measure(CONVOLUTION, ["fused"], OPTIONS, low, lambda event: None)[0][
        "fused"
    ].status == "pass"  # fmt: skip
    monkeypatch.setattr(measure_layer, "floor", lambda problem, ceilings, is_cold: cold)
    found = measure_layer.measure(CONVOLUTION, ["fused"], OPTIONS, low, lambda event: None)[0]
    assert found["fused"].status == "fail_to_run"
    assert "reading what no cache holds" in found["fused"].error


def test_pixels_that_a_stride_leaves_out_need_not_be_read() -> None:
    projection = ConvProblem(8, 256, 56, 56, 512, 1, 1, Geometry((2, 2)))
    assert projection.pixels_read == 1 / 4
    odd = ConvProblem(1, 1, 7, 5, 1, 1, 1, Geometry((2, 3)))
    assert odd.pixels_read * 35 == 4 * 2
    assert (
        PROBLEM.pixels_read
        == replace(PROBLEM, geometry=PROBLEM.geometry._replace(stride=(2, 2))).pixels_read
        == 1
    )
    dilated = ConvProblem(1, 1, 5, 1, 1, 3, 1, Geometry(dilation=(2, 1)))
    assert dilated.pixels_read * 5 == 3
    moved = 8 * 28 * 28 * (256 + 512) + 256 * 512 + 512
    assert projection.least_bytes == 2 * moved


def test_a_torn_row_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    row = SHEET.record(asked(CONVOLUTION, "fused"), Outcome("pass", "", {"p50_ms": 0.25}), STAMP)
    results.append_row(tmp_path, row, SHEET)
    with (tmp_path / SHEET.file).open("a") as file:
        file.write("tiny,conv_relu,2x16")  # killed in the middle of a write
    results.append_row(tmp_path, row, SHEET)
    read = results.read_rows(tmp_path, SHEET)
    assert list(read.p50_ms) == [0.25, 0.25]
    assert list(read.commit) == ["1e5", "1e5"]  # text, though it looks like a number
    assert list(read.gmacs) == pytest.approx([PROBLEM.macs / 1e9] * 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "resnet81"], "--model: unknown name 'resnet81'; did you mean resnet18"),
        (["--providers", "cudn"], "--providers: unknown name 'cudn'; did you mean cudnn"),
        (["--precision", "fp8"], "--precision: unknown name 'fp8'; "),
        (["-b", "0"], "--batch-size: 0; accepted: whole numbers from 1"),
        (["--rounds", "0"], "--rounds: 0; accepted: whole numbers from 1"),
        (["--rounds", "few"], "--rounds: 'few' is not a whole number"),
        (["--timeout", "0"], "--timeout: '0'; accepted: numbers above 0"),
        (["--device", "gpu"], "--device: 'gpu' cannot be used"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", "--results", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("resfuse: error: ") and said in error


NETWORK = '''"""A network of two convolutions."""

from torch import nn


def two(num_classes: int = 10, features_only: bool = False) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), *head)
'''
PLANTED = '''"""A provider that takes its process with it."""
import os

def build(layer, example):
    print("famous last words", flush=True)
    os.abort()
'''


@pytest.fixture(scope="module")
def planted(checkout: Path) -> Path:
    package = checkout / "resfuse"
    (package / "resnet_ref/two.py").write_text(NETWORK)
    models = package / "resnet_ref/models.py"
    insert_after(models, "CIFAR: dict", '    "two": two,')
    insert_after(models, "from torch import nn", "from resfuse.resnet_ref.two import two")
    (package / "bench/backends/providers/planted.py").write_text(PLANTED)
    build = "resfuse.bench.backends.providers.planted:build"
    line = f'    "abort": Provider("{build}", "-", "contiguous"),'
    insert_after(package / "bench/backends/providers/__init__.py", "PROVIDERS: dict", line)
    return checkout


def test_a_crash_costs_a_row_and_the_rest_is_measured(
    planted: Path, resfuse_in: Callable[..., Resfuse], forked_python: str, tmp_path: Path
) -> None:
    """The command as a user runs it: wildcards, CSV on stdout, rows and report in the folder."""
    done: subprocess.CompletedProcess[str] = resfuse_in(planted, forked_python)(
        "kernels",
        "-m",
        "tw*",
        "-b",
        "2",
        "--providers",
        "eager,fused,abort",
        "--device",
        "cpu",
        "--rounds",
        "3",
        "--results",
        tmp_path,
        "--csv",
    )
    assert done.returncode == 0, done.stderr
    folder = next(tmp_path.iterdir())
    rows = pd.read_csv(folder / SHEET.file)
    assert tuple(rows.columns) == SHEET.columns
    assert done.stdout.splitlines() == (folder / SHEET.file).read_text().splitlines()
    told = {(row.shape, row.provider): row.status for row in rows.itertuples(index=False)}
    shapes = ("2x3x32x32 k8 3x3 pad 0", "2x8x30x30 k8 1x1")
    expected = {"eager": "pass", "fused": "pass", "abort": "fail_to_run"}
    assert told == {(shape, name): expected[name] for shape in shapes for name in expected}
    assert "killed by SIGABRT: famous last words" in rows[rows.provider == "abort"].error.iloc[0]
    page = (folder / "DETAILS.md").read_text()
    assert "### two, 32 px, batch 2: convolutions" in page and "famous last words" in page
    assert set(rows.env_id) == set(results.read_environments(folder))
