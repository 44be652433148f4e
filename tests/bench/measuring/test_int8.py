"""`--precision int8`: the same fp32 network, quantized by every backend in its own way with the
same photographs; what a row says of it, and what is no int8."""

import inspect
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, Backend, computes_in, load_build
from resfuse.bench.backends.compute import Compute
from resfuse.bench.backends.openvino_int8 import require_integers
from resfuse.bench.cli import main
from resfuse.bench.common import vnni
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.measuring import correctness, measure_case, network
from resfuse.bench.measuring.fake_quantization import FakeQuantized
from resfuse.bench.measuring.inference import answers
from resfuse.bench.records import results
from resfuse.bench.records.case import PRECISIONS, Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.kernels import build_engine
from resfuse.resnet_ref import models
from resfuse.resnet_ref.cifar import cifar_resnet

pytestmark = pytest.mark.slow

CASE = Case("cifar_resnet8", "eager", "inference", "cpu", "int8", "contiguous", 4, 32)
OPTIONS = Options(seconds=0.05, min_rounds=6, max_rounds=12)
HAS_INT8 = "calibration" in inspect.signature(build_engine).parameters


@pytest.fixture(autouse=True)
def _a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (models.MODELS, models.CIFAR):
        monkeypatch.setitem(registry, "cifar_resnet8", partial(cifar_resnet, 8))


@pytest.fixture
def few_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools take half a minute for 64 photographs beside other tests."""
    monkeypatch.setattr(network, "QUANTIZATION_IMAGES", 32)


def measure(backend: str, **changes: object) -> Outcome:
    memory_format = BACKENDS[backend].memory_formats[-1]
    case = replace(CASE, backend=backend, memory_format=memory_format, **changes)
    return measure_case.measure(case, OPTIONS, {}, lambda event: None)[0]


@pytest.mark.usefixtures("few_photographs", "one_export_a_network")
@pytest.mark.parametrize("scenario", ["latency", "throughput"])
@pytest.mark.parametrize("backend", ["compiled", "onnxrt", "openvino", "engine"])
def test_backends_answer_as_well_as_the_simulation(backend: str, scenario: str) -> None:
    packages = {"compiled": "torchao", "onnxrt": "onnxruntime", "openvino": "nncf"}
    pytest.importorskip(packages.get(backend, "torch"))
    if backend == "engine" and not HAS_INT8:
        pytest.skip("build_engine has no int8")
    outcome = measure(backend, scenario=scenario)
    assert outcome.status == "pass", outcome.error
    found = {name: float(value) for name, value in outcome.metrics.items() if value and
             name in ("rel_l2_err", "sqnr_db", "p50_ms", "speedup")}  # fmt: skip
    assert 1e-3 < found["rel_l2_err"] < 0.3  # fp32's would be 1e-6, bf16's 4e-3
    assert found["sqnr_db"] == pytest.approx(-20 * math.log10(found["rel_l2_err"]))
    assert found["p50_ms"] > 0 and found["speedup"] > 0
    assert outcome.metrics["floor_ms"] is None and outcome.metrics["kl"] is not None


@pytest.mark.parametrize("backend", ["eager", "compiled_max_autotune", "fused"])
def test_what_has_no_int8_says_so(backend: str) -> None:
    outcome = measure(backend)
    assert (outcome.status, outcome.of_model) == ("unavailable", False)
    assert outcome.error == f"{backend} has no int8 here; compiled, engine, onnxrt, openvino have"


def test_training_has_precisions_of_its_own() -> None:
    outcome = measure("eager", mode="train")
    assert outcome.status == "unavailable"
    assert outcome.error == "int8 is a way to infer; amp_bf16 and bfloat16 train"


def test_other_commands_do_not_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "resnet18", "--precision", "int8"]) == 2
    said = capsys.readouterr().err
    assert "--precision: int8 is measured by `resfuse bench`, `resfuse sweep` and" in said
    assert PRECISIONS["int8"].storage == "int8" and PRECISIONS["int8"].dtype == "float32"


def prepared() -> tuple[nn.Module, list[Tensor], Compute]:
    compute = network.compute(CASE)
    assert compute is not None and compute.calibration is not None
    return network.master(CASE, 0), network.batches(CASE), compute


def test_no_measured_photograph_is_calibrated_with() -> None:
    _, batches, compute = prepared()
    assert compute.calibration is not None and compute.dtype == torch.int8
    assert len(compute.calibration) == 64 and compute.calibration.dtype == torch.float32
    measured = torch.cat(batches).flatten(1)
    apart = torch.cdist(compute.calibration.flatten(1), measured)
    assert float(apart.min()) > 1


def test_the_yardstick_is_the_simulation_and_a_baseline_in_fp32_has_another() -> None:
    model, batches, compute = prepared()
    found = answers(model, batches, "int8", compute)
    assert compute.calibration is not None
    with torch.inference_mode():
        lower = FakeQuantized(model, compute.calibration, 4)
        assert torch.equal(found.eager[0], lower(batches[0]))
    errors = [
        correctness.relative_error(y, exact[0])
        for y, exact in zip(found.eager, found.reference, strict=True)
    ]
    assert 1e-2 < max(errors) < 0.15
    assert found.limit.rel_l2 == pytest.approx(2 * max(errors) + 8e-3)
    assert found.least == pytest.approx(max(errors) / 100)
    baseline = found.of_baseline(computes_in("eager", compute))
    assert baseline.limit.rel_l2 < 1e-5 and baseline.least == 0
    assert torch.equal(baseline.eager[0], model(batches[0]))
    assert found.of_baseline(computes_in("openvino", compute)) is found


CHEATS = [
    ("fp32_behind_int8", True, "unavailable", "it computed in a finer precision than"),
    ("example_behind_int8", True, "fail_accuracy", "before timing"),
    ("int5_behind_int8", True, "fail_accuracy", "before timing"),
]


@pytest.mark.parametrize(("cheat", "own_way", "status", "said"), CHEATS)
def test_cheats_are_found_out(
    cheat: str, own_way: bool, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Backend(
        f"cheats:{cheat}", "planted", takes_compute_dtype=own_way, takes_calibration=own_way
    )
    monkeypatch.setitem(BACKENDS, "planted", planted)
    outcome = measure("planted")
    assert (outcome.status, said in outcome.error) == (status, True), outcome
    assert "p50_ms" not in outcome.metrics  # no speed without a right answer


@pytest.mark.parametrize("scenario", ["latency", "throughput"])
def test_what_is_built_sees_no_measured_image_before_the_first_check(
    scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation as a backend: it passes, with what it was given written down."""
    given: list[Tensor] = []
    seen_by_check: list[int] = []

    def build(
        model: nn.Module, example: Tensor, compute_dtype: torch.dtype, calibration: Tensor
    ) -> object:
        assert compute_dtype == torch.int8
        given.extend((example.clone(), calibration.clone()))
        lower = FakeQuantized(model, calibration, len(example))

        @torch.inference_mode()
        def run(images: Tensor) -> Tensor:
            if not seen_by_check:
                given.append(images.clone())
            result: Tensor = lower(images)
            return result

        return run

    monkeypatch.setitem(
        BACKENDS,
        "planted",
        Backend("planted:build", "planted", takes_compute_dtype=True, takes_calibration=True),
    )
    from resfuse.bench import backends

    real = backends.load
    monkeypatch.setattr(
        backends, "load", lambda target: build if target == "planted:build" else real(target)
    )
    judged = measure_case.answers

    def first_judged(*arguments: object) -> object:
        seen_by_check.append(1)
        return judged(*arguments)

    monkeypatch.setattr(measure_case, "answers", first_judged)
    outcome = measure("planted", scenario=scenario)
    assert outcome.status == "pass", outcome.error
    measured = torch.cat(network.batches(CASE)).flatten(1)
    own_size = [images for images in given if images.shape[-1] == 32]  # not the rehearsal's
    assert len(own_size) > 3
    assert float(torch.cdist(torch.cat(own_size).flatten(1), measured).min()) > 1


@pytest.mark.usefixtures("few_photographs", "one_export_a_network")
def test_a_baseline_quantizes_if_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    asked: list[tuple[str, bool]] = []

    def noting(name: str, compute: Compute | None = None) -> object:
        asked.append((name, compute is not None))
        return load_build(name, compute)

    monkeypatch.setattr("resfuse.bench.measuring.inference.load_build", noting)
    outcome = measure("onnxrt", baseline="onnxrt")
    assert outcome.status == "pass", outcome.error
    assert set(asked) == {("onnxrt", True)}
    asked.clear()
    outcome = measure("onnxrt", baseline="eager")
    assert set(asked) == {("onnxrt", True), ("eager", False)}


def test_openvino_is_asked_what_it_computes_in_int8() -> None:
    openvino = pytest.importorskip("openvino")
    from resfuse.bench.backends.onnx_export import exported

    model = network.master(CASE, 0)
    with exported(model, network.batches(CASE)[0]) as file:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(file), "CPU")
    with pytest.raises(Unavailable, match=r"computes none of \d+ convolutions and products in"):
        require_integers(compiled)


@pytest.mark.parametrize(
    ("machine", "flags", "narrow"),
    [
        ("x86_64", "flags : fma avx2", True),
        ("x86_64", "flags : avx2 avx_vnni", False),
        ("x86_64", "flags : avx2 avx512f avx512_vnni", False),
        ("aarch64", "Features : asimd", False),
    ],
)
def test_processors_without_vnni_add_in_16_bits(
    machine: str, flags: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vnni.platform, "machine", lambda: machine)
    monkeypatch.setattr(vnni, "processor", lambda: flags)
    assert vnni.saturates() is narrow


@pytest.mark.usefixtures("forked_workers")
def test_a_row_says_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    arguments = [
        "bench", "-m", "cifar_resnet20", "--backend", "eager,onnxrt", "--memory-format",
        "contiguous", "-b", "2", "--precision", "int8", "--seconds", "0.05",
        "--results", str(tmp_path),
    ]  # fmt: skip
    assert main(arguments) == 0
    (home,) = tmp_path.iterdir()
    eager, onnxrt = results.read_rows(home).to_dict("records")
    assert (eager["status"], onnxrt["status"]) == ("unavailable", "pass"), onnxrt["error"]
    assert (onnxrt["precision"], onnxrt["math_mode"]) == ("int8", "int8")
    assert float(onnxrt["sqnr_db"]) > 10 and float(onnxrt["kl"]) >= 0
    (facts,) = results.read_environments(home).values()
    assert "ceiling_int8_tflops" not in facts
    page = (home / "REPORT.md").read_text()
    assert "int8" in page
