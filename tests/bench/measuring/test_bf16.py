"""`--precision bf16`: the same fp32 network, computed in bfloat16 by every backend in its own way;
what a row says of it, and what is no bfloat16."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, Backend
from resfuse.bench.backends.compute import Compute
from resfuse.bench.cli import main
from resfuse.bench.measuring import correctness, measure_case, network
from resfuse.bench.measuring.inference import answers
from resfuse.bench.models import random_weights
from resfuse.bench.records import results
from resfuse.bench.records.case import PRECISIONS, Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.resnet_ref import models
from resfuse.resnet_ref.cifar import cifar_resnet

pytestmark = pytest.mark.slow

CASE = Case("cifar_resnet8", "eager", "inference", "cpu", "bf16", "contiguous", 4, 32)
OPTIONS = Options(seconds=0.05, min_rounds=6, max_rounds=12)
NO_BF16 = "openvino computes in f32 on this processor, not in bf16"


@pytest.fixture(autouse=True)
def _a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (models.MODELS, models.CIFAR):
        monkeypatch.setitem(registry, "cifar_resnet8", partial(cifar_resnet, 8))


def measure(backend: str, **changes: object) -> Outcome:
    memory_format = BACKENDS[backend].memory_formats[-1]
    case = replace(CASE, backend=backend, memory_format=memory_format, **changes)
    return measure_case.measure(case, OPTIONS, {}, lambda event: None)[0]


@pytest.mark.usefixtures("one_export_a_network")
@pytest.mark.parametrize("scenario", ["latency", "throughput"])
@pytest.mark.parametrize("backend", ["eager", "compiled", "openvino", "fused", "engine"])
def test_every_backend_answers_as_well_as_eager_in_bf16(backend: str, scenario: str) -> None:
    pytest.importorskip("openvino" if backend == "openvino" else "torch")
    outcome = measure(backend, scenario=scenario)
    if outcome.error == NO_BF16:
        pytest.skip(outcome.error)
    assert outcome.status == "pass", outcome.error
    assert 1e-4 < float(outcome.metrics["rel_l2_err"]) < 0.1  # fp32's would be 1e-6
    assert float(outcome.metrics["p50_ms"]) > 0


def test_onnx_runtime_says_that_its_cpu_has_none() -> None:
    pytest.importorskip("onnxruntime")
    outcome = measure("onnxrt")
    assert outcome.status == "unavailable"
    assert outcome.error == "onnxruntime's CPUExecutionProvider has no bfloat16 convolution"


def test_training_has_precisions_of_its_own() -> None:
    outcome = measure("eager", mode="train")
    assert outcome.status == "unavailable"
    assert outcome.error == "bf16 is a way to infer; amp_bf16 and bfloat16 train"


@pytest.mark.usefixtures("forked_workers")
def test_a_row_says_what_was_computed_in(tmp_path: Path) -> None:
    arguments = [
        "bench", "-m", "cifar_resnet20", "--backend", "eager", "--memory-format", "contiguous",
        "-b", "2", "--precision", "bf16", "--seconds", "0.05", "--results", str(tmp_path),
    ]  # fmt: skip
    assert main(arguments) == 0
    (home,) = tmp_path.iterdir()
    (row,) = results.read_rows(home).to_dict("records")
    assert (row["status"], row["precision"], row["math_mode"]) == ("pass", "bf16", "bf16")
    assert float(row["rel_l2_err"]) > 1e-4
    (facts,) = results.read_environments(home).values()
    assert float(facts["ceiling_bf16_tflops"]) > 0


def prepared() -> tuple[nn.Module, list[Tensor]]:
    return network.master(CASE, 0), network.batches(CASE)


def test_weights_images_and_answers_are_fp32_and_the_yardstick_is_bf16() -> None:
    model, batches = prepared()
    kinds = {tensor.dtype for tensor in (*model.parameters(), *batches)}
    assert kinds == {torch.float32}
    expected = answers(model, batches, "bf16", Compute(torch.bfloat16))
    with torch.inference_mode():
        lower = nn.Sequential(network.master(CASE, 0).bfloat16())(batches[0].bfloat16())
        exact = network.master(CASE, 0).double()(batches[0].double())
    (eager, *_), (reference, *_) = expected.eager, expected.reference
    assert eager.dtype == torch.float32 and torch.equal(eager, lower.float())
    assert torch.equal(reference[0], exact)
    own = max(map(correctness.relative_error, expected.eager, (r[0] for r in expected.reference)))
    assert expected.limit.rel_l2 == pytest.approx(2 * own + 8e-3)


def test_the_least_time_counts_two_bytes_a_number() -> None:
    found = {name: network.element_bytes(replace(CASE, precision=name)) for name in PRECISIONS}
    assert found == {
        "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "bf16": 2, "int8": 1,
        "amp_bf16": 4, "amp_fp16": 4,
    }  # fmt: skip


def plant(build: str, monkeypatch: pytest.MonkeyPatch, takes_compute_dtype: bool) -> Outcome:
    planted = Backend(f"cheats:{build}", "planted", takes_compute_dtype=takes_compute_dtype)
    monkeypatch.setitem(BACKENDS, "planted", planted)
    return measure("planted")


@pytest.mark.parametrize(
    ("cheat", "own_way", "status", "said"),
    [
        ("fp32_behind_bf16", True, "unavailable", "it computed in a finer precision than"),
        ("stale_in_bf16", True, "fail_accuracy", "before timing"),
        ("fp8_behind_bf16", True, "fail_accuracy", "before timing"),
        ("previous_input", False, "fail_accuracy", "before timing"),
        ("stale_buffer", False, "fail_accuracy", "before timing"),
        ("last_image_skipped", False, "fail_accuracy", "before timing"),
        ("cached_after_checks", False, "fail_accuracy", "in a timed round"),
    ],
)
def test_cheats_are_found_out(
    cheat: str, own_way: bool, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = plant(cheat, monkeypatch, own_way)
    assert (outcome.status, said in outcome.error) == (status, True), outcome
    assert "p50_ms" not in outcome.metrics  # no speed without a right answer


class Shortcuts(nn.Module):
    """A projection of one convolution beside a branch of two; a sum of what no norm made."""

    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.project, self.norm3 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        assert self.traceable or bool(x.sum() < 1e9)
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        y += self.norm3(self.project(x))
        return y.relu() + y


def test_branches_shrink_and_shortcuts_do_not() -> None:
    for traceable, gain in (True, 0.2), (False, 1.0):
        model = Shortcuts(traceable)
        random_weights.shrink_branches(model)
        scales = [float(norm.weight[0]) for norm in (model.norm1, model.norm2, model.norm3)]
        assert scales == pytest.approx([1, gain, 1])


def test_a_seeded_mobilenet_tells_photographs_apart() -> None:
    """As it is drawn, bfloat16 is off by two thirds of what photographs differ in."""
    name = "torchvision:mobilenet_v2"
    case = replace(CASE, model=name, batch_size=1, img_size=224)
    batches = network.batches(case)
    with pytest.raises(correctness.WrongAnswer, match="cannot tell inputs apart"):
        model = network.master(replace(case, precision="float32"), 0)
        answers(model, batches, "bf16", Compute(torch.bfloat16))
    expected = answers(network.master(case, 0), batches, "bf16", Compute(torch.bfloat16))
    assert expected.limit.rel_l2 < 0.1
    other = expected.reference[1]
    with pytest.raises(correctness.WrongAnswer, match="relative error"):
        expected.require(other[0].float(), 0, "remembered")
