"""`resfuse study models --kinds speed`: what a failure costs, and what ends with the command."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import cheats
from resfuse.bench import backends
from resfuse.bench.cli import main
from resfuse.bench.measuring import correctness
from resfuse.bench.records import results
from resfuse.bench.records.case import Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.studies.models import measure_speed, speed_study
from resfuse.bench.studies.models.speed_study import SPEEDS

pytestmark = pytest.mark.slow
TINY = "torchvision squeezenet1_1"


def nothing(*_: object, **__: object) -> None:
    """What a worker tells its parent, unheard."""


def plant(monkeypatch: pytest.MonkeyPatch, **builds: Callable[[nn.Module, Tensor], Any]) -> None:
    """Adds backends that are built by these functions."""
    for name in builds:
        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(name, "planted"))
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda target: builds.get(target) or real(target))


def test_a_failure_while_timing_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises_late(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        calls: list[Tensor] = []

        def run(images: Tensor) -> Tensor:
            calls.append(images)
            if len(calls) > 8:
                raise RuntimeError("out of luck")
            with torch.inference_mode():
                return model(images)

        return run

    plant(monkeypatch, cached=cheats.cached_after_checks, late=raises_late)
    told: list[tuple[object, ...]] = []
    outcomes, span_s = measure_speed.measure(
        TINY, ["cached", "eager", "late"], 1, 64, Options(seconds=0.02),
        lambda *event, **more: told.append(event),
    )  # fmt: skip
    assert {name: one.status for name, one in outcomes.items()} == {
        "cached": "fail_accuracy", "late": "fail_to_run", "eager": "pass",
    }  # fmt: skip
    assert "in a timed round" in outcomes["cached"].error
    assert "out of luck" in outcomes["late"].error
    assert span_s > 0 and told[-1] == ("timed",)


def test_a_network_without_a_reference_is_no_backends_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Chaos(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e9 * x.mean((2, 3)))

    monkeypatch.setattr(measure_speed, "build", lambda *_: Chaos().eval())
    found, _ = measure_speed.measure(TINY, ["eager", "fused"], 1, 64, Options(), nothing)
    for outcome in found.values():
        assert outcome.status == "unavailable"
        assert re.match("no reference: .*(from fp64|cannot tell inputs apart)", outcome.error)


@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_photographs_that_are_answered_alike_are_changed_in_low_precision(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """In fp32 such a network has collapsed, and no other photographs would help."""
    real, asked = measure_speed.answers, []

    def answers(model: nn.Module, batches: list[Tensor], *more: Any) -> Any:
        asked.append(torch.cat(batches))
        if len(asked) == 1:
            raise correctness.NotTelling("the check cannot tell inputs apart")
        return real(model, batches, *more)

    monkeypatch.setattr(measure_speed, "answers", answers)
    found, _ = measure_speed.measure(
        TINY, ["eager"], 2, 64, Options(seconds=0.02), nothing, precision
    )
    if precision == "float32":
        assert found["eager"].error == "no reference: the check cannot tell inputs apart"
        return
    assert found["eager"].status == "pass"
    first, second = asked
    assert first.shape == second.shape == (6, 3, 64, 64) and not torch.equal(first, second)


def answer(backends: list[str], watched_s: float = 1.0) -> dict[str, Any]:
    """What a worker sends."""
    return {
        "outcomes": {name: {"status": "pass"} for name in backends},
        "span_s": 1.0, "watched_s": watched_s,
    }  # fmt: skip


def test_a_backend_that_hangs_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run_task(
        task: str, job: Mapping[str, Any], limit_s: float, heard: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any] | Outcome:
        asked.append(list(job["backends"]))
        for name in job["backends"]:
            heard({"backend": name})
            if name == "hangs":
                return Outcome("timeout", f"not done after {limit_s:g} s")
        heard({"backend": ""})
        return answer(job["backends"])

    monkeypatch.setattr(speed_study, "run_task", run_task)
    options = Options(timeout_s=7)
    found = dict(speed_study.outcomes(1, TINY, 64, ["eager", "hangs", "fused"], options))
    assert asked == [["eager", "hangs", "fused"], ["eager", "fused"]]
    assert {name: one.status for name, one in found.items()} == {
        "hangs": "timeout", "eager": "pass", "fused": "pass",
    }  # fmt: skip
    assert found["hangs"].error == "as it was set up: not done after 7 s"
    cut_off = speed_study.outcomes(1, TINY, 64, ["hangs", "eager"], options, lambda: 3.0)
    assert dict(cut_off) == {}, "the budget's end is no timeout of the backend's"


def test_clocks_that_disagree_fail_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_study, "run_task", lambda *_: answer(["eager", "fused"], 9.0))
    found = dict(speed_study.outcomes(1, TINY, 64, ["eager", "fused"], Options()))
    assert {one.status for one in found.values()} == {"fail_to_run"}
    monkeypatch.setattr(speed_study, "run_task", lambda *_: answer(["eager"]))
    found = dict(speed_study.outcomes(1, TINY, 64, ["eager", "fused"], Options()))
    assert "no message of ours" in found["fused"].error


def test_the_budget_ends_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_task(task: str, job: Mapping[str, Any], *_: object) -> dict[str, Any]:
        time.sleep(0.4)
        return answer(list(job["backends"]))

    monkeypatch.setattr(speed_study, "run_task", run_task)
    asked = ["study", "models", "--kinds", "speed", "-m", "timm resnet1*", "--backend", "eager"]
    assert main([*asked, "-b", "1,8", "--budget", "1", "--results", str(tmp_path)]) == 0
    (home,) = tmp_path.iterdir()
    done = len(results.read_rows(home, SPEEDS))
    assert 1 <= done <= 2
    assert f"{8 - done} of 8 left out for want of time; --resume" in capsys.readouterr().out


HANGS = """
import sys, time
from pathlib import Path
from resfuse.bench.studies.models import models_study

def hangs(network, img_size, kinds):
    Path(network).touch()
    time.sleep(600)

models_study.compare = hangs
if __name__ == "__main__":
    list(models_study.rows([sys.argv[1]], 32, 600.0))
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_command(number: signal.Signals, tmp_path: Path) -> None:
    script, at_work = tmp_path / "hangs.py", tmp_path / "at-work"
    script.write_text(HANGS)
    parent = psutil.Popen(
        [sys.executable, str(script), str(at_work)], stderr=subprocess.DEVNULL,
        # a shell's background jobs ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    workers: list[psutil.Process] = []
    try:
        while not at_work.exists():
            assert parent.poll() is None
            time.sleep(0.1)
        workers += parent.children(recursive=True)
        assert workers
        parent.send_signal(number)
        parent.wait(30)
        _, alive = psutil.wait_procs(workers, 30)
        assert not alive
    finally:
        for process in [parent, *workers]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
