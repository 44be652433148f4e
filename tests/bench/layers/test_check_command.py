"""`resfuse check`: finds every configuration, and wrong, crashing and hanging ones among them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from triton.runtime.errors import InterpreterError

from resfuse.bench.cli import main
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.layers.kernel_check import trials_process
from resfuse.bench.layers.kernel_check.check_command import SHEET, check_configs
from resfuse.bench.layers.kernel_check.checker import judge, key
from resfuse.bench.layers.kernel_check.trials import TRIALS, Place, Trial, trials_of
from resfuse.bench.records import results
from resfuse.bench.records.outcome import Outcome
from resfuse.kernels.gpu.block_tail import block_tail_config
from resfuse.kernels.gpu.bn_act import bn_act
from resfuse.kernels.gpu.common import launch
from resfuse.kernels.gpu.common.launch import refusal_of_interpreter
from resfuse.kernels.gpu.conv import conv_config, depthwise
from resfuse.kernels.gpu.conv1x1 import conv1x1_config
from resfuse.kernels.gpu.registry import KERNELS
from resfuse.kernels.gpu.stem import stem_config
from resfuse.kernels.ops.conv_problem import MATH_MODES

pytestmark = pytest.mark.slow

FOUND = {
    "device": "cuda",
    "env_id": "0123456789",
    "commit": "abc",
    "facts": {"device_name": "an abacus"},
}
CONSOLE = Console(quiet=True)


def every_trial(kernel: str) -> list[Trial]:
    modes = [*MATH_MODES, "int8"]
    return [t for mode in modes for t in trials_of(kernel, Place("meta", mode, False))]


def test_every_configuration_of_every_kernel_is_tried() -> None:
    assert set(TRIALS) == set(KERNELS)
    for kernel in TRIALS:
        keys = [key(kernel, trial) for trial in every_trial(kernel)]
        assert len(set(keys)) == len(keys), kernel
    modes = conv_config.BY_MATH_MODE.values()
    assert len(every_trial("conv_bn_act")) == sum(map(len, modes)) + 4 * len(depthwise.CONFIGS)
    assert len(every_trial("conv_int8")) == len(conv_config.INT8) + len(conv1x1_config.INT8)
    assert len(every_trial("bn_act")) == 3 * len(bn_act.CONFIGS)
    stems = {(t.math_mode, t.launch.constants["BLOCK_M"]) for t in every_trial("stem")}
    assert {block for _, block in stems} == {c.block_m for c in stem_config.CONFIGS}
    tables = block_tail_config.TILES.values()
    configs = sum(len(configs) for table in tables for configs in table.values())
    assert len(every_trial("block_tail")) == configs


def test_what_is_compiled_ahead_compiles() -> None:
    """For a GPU that need not be here; in a process that does not interpret."""
    code = (
        "from resfuse.bench.layers.kernel_check.trials import TRIALS, Place\n"
        "from resfuse.kernels.gpu.inspect.inspect import compile_launch\n"
        "from triton.backends.compiler import GPUTarget\n"
        "trial = next(TRIALS['bn_act'](Place('meta', 'fp16', False)))\n"
        "print('cubin' in compile_launch(trial.launch, GPUTarget('cuda', 90, 32)).asm)"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def small(kernel: str) -> Trial:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return next(TRIALS[kernel](Place(device, "fp16", True)))


@pytest.mark.parametrize("kernel", TRIALS)
def test_right_answers_pass(kernel: str) -> None:
    outcome = judge(small(kernel))
    assert outcome.status == "pass"
    error = float(outcome.metrics["rel_l2_err"] or 0)
    assert error == 0 if kernel.endswith("int8") else 0 < error < 1e-3


@pytest.mark.parametrize("spoil", ["one element", "not a number"])
def test_a_wrong_element_fails(spoil: str) -> None:
    """A single one is enough."""
    trial = small("stem")
    right = trial.expected()[0]
    wrong = right.clone()
    wrong[0, 3, 1, 1] += 0.1
    if spoil == "not a number":
        wrong[0, 3, 1, 1] = torch.nan
    outcome = judge(replace(trial, expected=lambda: (wrong,)))
    assert outcome.status == "fail_accuracy"
    assert outcome.error == f"1 of {right.numel()} elements are wrong"


Heard = Callable[[dict[str, Any]], None]


def tried(name: str, status: str = "pass") -> dict[str, Any]:
    return {"key": name, "status": status, "error": "", "metrics": {"rel_l2_err": 1e-4}}


def test_who_crashes_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[list[str]] = []

    def fake(
        kernels: list[str],
        modes: list[str],
        device: str,
        skip: list[str],
        timeout_s: float,
        heard: Heard,
    ) -> Outcome | None:
        skipped.append(skip)
        if skip:
            heard({"began": "stem|fp16|third"})
            heard(tried("stem|fp16|third", "fail_accuracy"))
            return None
        heard({"began": "stem|fp16|first"})
        heard(tried("stem|fp16|first"))
        heard({"began": "stem|fp16|second"})
        return Outcome("fail_to_run", "the subprocess was killed by SIGSEGV")

    monkeypatch.setattr(trials_process, "run_trials", fake)
    counts, finished = check_configs(["stem"], ["fp16"], tmp_path, FOUND, CONSOLE, resume=False)
    assert finished
    assert skipped == [[], ["stem|fp16|first", "stem|fp16|second"]]
    rows = results.read_rows(tmp_path, SHEET)
    assert list(rows.label) == ["first", "second", "third"]
    assert list(rows.status) == ["pass", "fail_to_run", "fail_accuracy"]
    assert "SIGSEGV" in rows.error[1]
    assert dict(counts) == {"pass": 1, "fail_to_run": 1, "fail_accuracy": 1}
    # What crashed is tried again; what is settled is not.
    check_configs(["stem"], ["fp16"], tmp_path, FOUND, CONSOLE, resume=True)
    assert skipped[-1] == ["stem|fp16|first", "stem|fp16|third"]


def test_who_is_cut_off_by_the_time_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [100.0]

    def fake(*arguments: Any) -> Outcome:
        heard: Heard = arguments[-1]
        heard(tried("stem|fp16|first"))
        heard({"began": "stem|fp16|second"})
        left[0] = 0.0
        return Outcome("timeout", "not done after 100 s")

    monkeypatch.setattr(trials_process, "run_trials", fake)
    _, finished = check_configs(
        ["stem"], ["fp16"], tmp_path, FOUND, CONSOLE, False, lambda: left[0]
    )
    assert not finished
    assert list(results.read_rows(tmp_path, SHEET).label) == ["first"]


def test_a_subprocess_that_tries_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_process, "run_trials", lambda *_: Outcome("fail_to_run", "no torch"))
    with pytest.raises(RuntimeError, match="no configuration can be tried: no torch"):
        check_configs(["stem"], ["fp16"], tmp_path, FOUND, CONSOLE, resume=False)


@pytest.mark.usefixtures("forked_workers")
def test_the_command_writes_rows_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", "--kernel", "bn_act", "--device", "cpu", "--results", str(tmp_path)]
    assert main(arguments) == 0
    [folder] = tmp_path.iterdir()
    rows = results.read_rows(folder, SHEET)
    assert list(rows.status) == ["pass", "pass"]
    assert (rows.rel_l2_err > 0).all()
    assert main([*arguments, "--resume"]) == 0
    assert len(results.read_rows(folder, SHEET)) == 2
    assert "nothing to try" in capsys.readouterr().err


def test_refuses_unknown_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--kernel", "stam", "--results", str(tmp_path)]) == 2
    assert "--kernel: unknown name 'stam'; did you mean stem" in capsys.readouterr().err


def test_an_interpreter_that_does_not_run_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Hundreds of rows would each say what one does."""
    facts = {"device_name": "a CPU", "triton": "3.6.0", "numpy": "2.4.0"}
    found = FOUND | {"device": "cpu", "facts": facts}
    with pytest.raises(Unavailable, match=r"Triton 3\.6\.0's interpreter .* here 2\.4\.0; install"):
        check_configs(["bn_act"], ["ieee"], tmp_path, found, CONSOLE, False)
    assert list(tmp_path.iterdir()) == []
    assert refusal_of_interpreter("3.6.0", "2.3.5") is None
    assert refusal_of_interpreter("3.8.0", "2.5.2") is None


def test_a_launch_says_why_it_is_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def fails(**given: Any) -> None:
                raise InterpreterError(self.said)

            return fails

        said = "TypeError('only 0-dimensional arrays can be converted to Python scalars')"

    kernel = Kernel()
    made = launch.Launch(kernel, (1,), {"x_ptr": torch.empty(1, device="meta")}, {}, 4, 1)
    monkeypatch.setattr(launch, "refusal_of_interpreter", lambda: "install numpy<2.4")
    with pytest.raises(RuntimeError, match="install numpy"):
        made.run()
    kernel.said = "IndexError('ours')"
    with pytest.raises(InterpreterError, match="ours"):
        made.run()
