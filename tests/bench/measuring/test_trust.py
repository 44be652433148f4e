"""The harness against backends that cheat, and against honest ones that must pass."""

import sys

import pytest
import torch

from resfuse.bench.backends import BACKENDS, Backend, eager
from resfuse.bench.measuring import measure_case
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.training_step import Run
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running import subprocess_runner

pytestmark = pytest.mark.slow

# Some 30 ms a step: long enough for clocks to be compared, short enough for a suite.
CASE = Case("resnet18", "eager", "inference", "cpu", "float32", "contiguous", 4, 64)
SMALL = Case("cifar_resnet20", "eager", "train", "cpu", "float32", "contiguous", 4, 32)
OPTIONS = Options(seconds=0.3, min_rounds=6, max_rounds=12)


def outcome_of(build: str, monkeypatch: pytest.MonkeyPatch, case: Case = CASE) -> Outcome:
    monkeypatch.setitem(BACKENDS, "planted", Backend(f"cheats:{build}", "planted"))
    for name in ("_clock_ns", "_second_clock_ns"):  # put back whatever a cheat does to them
        monkeypatch.setattr(timing, name, getattr(timing, name))
    planted = Case(**{**vars(case), "backend": "planted"})
    return measure_case.measure(planted, OPTIONS, {}, lambda event: None)[0]


@pytest.mark.parametrize(
    ("cheat", "said"),
    [
        ("cached_by_pointer", "before timing"),
        ("cached_after_checks", "in a timed round"),
        ("tuned_on_the_checks", "after timing, on a new batch"),
        ("previous_input", "before timing"),
        ("stale_buffer", "relative error nan"),
        ("zeros", "relative error 1 "),
        ("late_thread", "relative error"),
        ("other_worker", "relative error"),
        ("lazy", "LazyTensor, not a plain tensor"),
        ("lower_precision", "before timing"),
        ("one_layer_lower", "before timing"),
        ("head_lower", "before timing"),
        ("wrong_dtype", "dtype is torch.float16"),
        ("first_image_only", "before timing"),
        ("last_image_skipped", "before timing"),
        ("shorter_batch", "shape is torch.Size([2, 1000]), eager's is torch.Size([4, 1000])"),
        ("padded_batch", "before timing"),
    ],
)
def test_wrong_answers_are_rejected(cheat: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = outcome_of(cheat, monkeypatch)
    assert (outcome.status, said in outcome.error) == ("fail_accuracy", True), outcome
    assert "p50_ms" not in outcome.metrics  # no speed without a right answer


@pytest.mark.parametrize("cheat", ["remembers_content", "remembers_roughly"])
def test_remembered_answers_are_rejected(cheat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in every check, and fast only for the inputs of the checks."""
    outcome = outcome_of(cheat, monkeypatch)
    assert outcome.status == "fail_to_run", outcome
    assert "it remembers answers" in outcome.error
    assert "p50_ms" not in outcome.metrics


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
def test_work_on_another_stream_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(**{**vars(CASE), "device": "cuda", "batch_size": 64, "img_size": 224})
    outcome = outcome_of("other_stream", monkeypatch, case)
    assert outcome.status in ("fail_accuracy", "fail_to_run"), outcome
    assert "relative error" in outcome.error or "ClockError" in outcome.error


@pytest.mark.parametrize("cheat", ["patched_clock", "stopped_clock"])
def test_a_patched_clock_is_rejected(cheat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = outcome_of(cheat, monkeypatch)
    assert outcome.status == "fail_to_run", outcome
    assert outcome.error.startswith("ClockError"), outcome.error


def test_the_parents_watch_sees_what_no_clock_inside_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both clocks of the subprocess slowed, its own span is half of what the parent sees."""
    monkeypatch.setitem(BACKENDS, "planted", Backend("cheats:patched_both_clocks", "planted"))
    for name in ("_clock_ns", "_second_clock_ns"):
        monkeypatch.setattr(timing, name, getattr(timing, name))
    outside = timing._clock_ns
    moments = []
    case = Case(**{**vars(CASE), "backend": "planted", "batch_size": 16})
    options = Options(seconds=3, min_rounds=10)
    outcome, claimed_s = measure_case.measure(
        case, options, {}, lambda event: moments.append(outside())
    )
    assert outcome.status == "pass"  # inside, nothing looks wrong
    seen_s = (moments[1] - moments[0]) / 1e9
    said = subprocess_runner.compare_watches(outcome, claimed_s, seen_s)
    assert said.status == "fail_to_run"
    assert "by the case's own clocks" in said.error


def test_zero_inputs_are_no_inputs() -> None:
    """The harness brings the images itself: real ones, all different, never zeros."""
    from resfuse.bench.measuring.network import batches

    for images in (made := batches(CASE)):
        assert images.flatten(1).std(dim=1).min() > 0.1
    assert not torch.equal(made[0], made[1])


def test_a_network_that_tells_nothing_apart_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its last layer at zero a network answers every image alike, and any cache would pass."""
    from resfuse.bench.measuring import network

    def blind(made: torch.nn.Module, case: Case, seed: int) -> torch.nn.Module:
        model = original(made, case, seed)
        torch.nn.init.zeros_(model.fc.weight)
        return model

    original = network.prepared
    monkeypatch.setattr(network, "prepared", blind)
    outcome, _ = measure_case.measure(CASE, OPTIONS, {}, lambda event: None)
    assert outcome.status == "fail_accuracy"
    assert "cannot tell inputs apart" in outcome.error


def test_faster_than_possible_fails() -> None:
    """Ceilings a thousand times too low make any time look impossible, as a broken timer would."""
    low = {"ceiling_ieee_tflops": 1e-4, "ceiling_copy_gb_s": 10.0}
    outcome, _ = measure_case.measure(CASE, OPTIONS, low, lambda event: None)
    assert outcome.status == "fail_to_run"
    assert "faster than possible" in outcome.error


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_an_honest_backend_passes(memory_format: str) -> None:
    case = Case(**{**vars(CASE), "memory_format": memory_format})
    outcome, _ = measure_case.measure(case, OPTIONS, {}, lambda event: None)
    assert outcome.status == "pass", outcome.error
    assert 0 < outcome.metrics["rel_l2_err"] < 1e-5
    assert outcome.metrics["top1_agree"] == 1.0
    assert outcome.metrics["rounds"] >= OPTIONS.min_rounds


CODE: list[torch.Tensor] = []


def loads_code(model: torch.nn.Module, example: torch.Tensor) -> Run:
    """An honest backend, with 200 MB that it loads once in a process."""
    if not CODE:
        CODE.append(torch.ones(50 * 2**20))
    return eager.build(model, example)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_what_a_backend_loads_once_is_not_the_networks_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "planted", Backend(f"{__name__}:loads_code", "planted"))
    case = Case(**{**vars(CASE), "backend": "planted"})
    outcome, _ = measure_case.measure(case, OPTIONS, {}, lambda event: None)
    assert outcome.status == "pass" and CODE
    assert 45 < float(outcome.metrics["peak_mem_mb"]) < 120  # ResNet-18 has 45 MB of weights
    CODE.clear()


def test_training_gradients_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that detaches half of the network trains faster, and wrongly."""
    monkeypatch.setitem(
        BACKENDS, "planted", Backend("cheats:zeros", "planted", trainable="cheats:frozen_stem")
    )
    case = Case(**{**vars(CASE), "backend": "planted", "mode": "train"})
    outcome, _ = measure_case.measure(case, OPTIONS, {}, lambda event: None)
    assert outcome.status == "fail_accuracy"
    assert "of the gradients" in outcome.error


@pytest.mark.parametrize("backend", ["eager", "compiled", "fused"])
def test_honest_training_passes_and_splits_its_time(backend: str) -> None:
    case = Case(**{**vars(CASE), "mode": "train", "backend": backend})
    outcome, _ = measure_case.measure(case, OPTIONS, {}, lambda event: None)
    assert outcome.status == "pass", outcome.error
    phases = [outcome.metrics[f"train_{phase}_time"] for phase in ("fwd", "bwd", "opt")]
    assert all(phase > 0 for phase in phases)
    assert outcome.metrics["infer_samples_per_sec"] is None


def test_the_loss_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Backend("cheats:zeros", "planted", trainable="cheats:wrong_loss")
    monkeypatch.setitem(BACKENDS, "planted", planted)
    case = Case(**{**vars(SMALL), "backend": "planted"})
    outcome = measure_case.measure(case, OPTIONS, {}, lambda event: None)[0]
    assert (outcome.status, "of the loss" in outcome.error) == ("fail_accuracy", True), outcome


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16"])
def test_training_under_autocast(precision: str) -> None:
    """fp32 weights are multiplied in fewer bits, which the error against fp64 must show."""
    case = Case(**{**vars(SMALL), "precision": precision})
    outcome = measure_case.measure(case, OPTIONS, {}, lambda event: None)[0]
    assert outcome.status == "pass", outcome.error
    assert outcome.metrics["rel_l2_err"] > 1e-3
    peak, above = (outcome.metrics[f"{name}_mb"] for name in ("peak_mem", "train_activation_mem"))
    parameters = outcome.metrics["param_count"] * 1e6 * 4 / 2**20
    # Weights, gradients and momentum, all in fp32, are what the activations are without.
    assert peak - above == pytest.approx(3 * parameters, rel=1e-3)


def test_autocast_is_for_training() -> None:
    case = Case(**{**vars(SMALL), "mode": "inference", "precision": "amp_bf16"})
    outcome = measure_case.measure(case, OPTIONS, {}, lambda event: None)[0]
    assert outcome.status == "unavailable"
    assert "amp_bf16 is a way to train" in outcome.error
