"""A lent GPU on which everything costs seconds of a simulated clock. Nothing else is made up: the
plan, its steps, sweeps, rows and archives are the real ones.

Seconds are those counted for an H200 (torch 2.11, triton 3.6) before one was at hand: see
tools/gpu_plan/costs.py for where they come from. They stand here once more, so that a change of the
plan's own numbers is held against what was counted.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from resfuse.bench import cli
from resfuse.bench.measuring.probes import machine
from resfuse.bench.records.case import Case, Options, Request
from resfuse.bench.records.outcome import Outcome
from resfuse.tools.gpu_plan import gpu_plan_command
from resfuse.tools.gpu_plan.means import Means

SURVEY_S, CEILINGS_S, QUESTION_S = 5.0, 20.0, 4.0
CHECK_S = {"fp16": 40.0, "all": 100.0}
BESIDE = "beside"
SECONDS = {
    ("cudnn_fused", 1): 18.0, ("engine", 1): 40.0, (BESIDE, 1): 30.0,
    ("cudnn_fused", 256): 18.0, ("engine", 256): 60.0, (BESIDE, 256): 35.0,
    ("fused", 1): 18.0, ("fused", 256): 22.0, ("eager", 1): 15.0, ("eager", 256): 17.0,
    ("compiled", 1): 45.0, ("compiled", 256): 45.0,
    ("compiled_max_autotune", 1): 150.0, ("compiled_max_autotune", 256): 150.0,
}  # fmt: skip
QUESTIONS = ("conv + relu", "stem", "split_k", "resident tail", "projection")
FACTS = {"device_name": "a simulated H200", "device": "cuda"}
CEILINGS = {"ceiling_copy_gb_s": "4149", "ceiling_fp16_tflops": "768"}
METRICS: dict[str, float | str | None] = {
    "p50_ms": 5.0, "infer_samples_per_sec": 51_200.0, "train_samples_per_sec": None,
    "speedup": 1.1, "speedup_ci_low": 1.09, "speedup_ci_high": 1.11, "sol_pct": 55.0, "rounds": 99,
    "ended_by": "interval",
}  # fmt: skip


class Killed(BaseException):
    """Stands for a killed process: no handler catches it, and the files stay as they are."""


@dataclass
class SimulatedGpu:
    """Carries on from one command to the next: what an engine has timed stays timed.

    `trouble`: what a case ends with, by the times it was begun before; None for no trouble.
    """

    seconds: dict[tuple[str, int], float] = field(default_factory=lambda: dict(SECONDS))
    trouble: Callable[[Case, int], Outcome | None] = lambda case, begun: None
    cut_at: float = float("inf")
    cut_by: type[BaseException] = KeyboardInterrupt
    archive: Path | None = None  # kept as `<name>.killed` at the moment of the cut
    now: float = 0.0
    begun: list[Case] = field(default_factory=list)
    ended: list[tuple[float, Case, str]] = field(default_factory=list)
    kept_s: dict[Case, float] = field(default_factory=dict)  # of work that a cut case has done

    def spend(self, seconds: float) -> None:
        if self.now + seconds > self.cut_at:
            self.now = self.cut_at
            if self.archive is not None and self.archive.exists():
                shutil.copy(self.archive, self.killed)
            raise self.cut_by
        self.now += seconds

    @property
    def killed(self) -> Path:
        assert self.archive is not None
        return self.archive.with_suffix(".killed")

    def survey(
        self,
        request: Request,
        threads: int,
        ceilings: bool,
        limit_s: float,
        known: list[dict[str, str]],
    ) -> dict[str, Any]:
        unknown = CEILINGS.keys() - machine.known_ceilings(FACTS, known).keys()
        self.spend(SURVEY_S + CEILINGS_S * bool(unknown))
        unavailable = {"onnxrt": "onnxruntime has no CUDAExecutionProvider"}
        return {
            "device": "cuda", "facts": FACTS, "env_id": "env", "commit": "commit",
            "folder": "a-simulated-h200", "ceilings": CEILINGS,
            "unavailable": {n: why for n, why in unavailable.items() if n in request.backends},
        }  # fmt: skip

    def needs(self, case: Case) -> float:
        name = case.backend if case.baseline == "eager" else BESIDE
        size = 256 if case.batch_size >= 32 else 1
        return 45.0 if case.mode == "train" else self.seconds[name, size]

    def measure(self, case: Case, options: Options, ceilings: dict[str, float]) -> Outcome:
        trouble = self.trouble(case, self.begun.count(case))
        self.begun.append(case)
        needed = self.needs(case) - self.kept_s.get(case, 0.0)
        try:
            self.spend(min(needed, options.timeout_s))
        except BaseException:
            self._keep(case, 0.0)
            raise
        if needed > options.timeout_s:
            self._keep(case, options.timeout_s)
            return Outcome("timeout", f"not done after {options.timeout_s:g} s")
        outcome = trouble or Outcome("pass", "", METRICS, explanation="a table of segments")
        self.ended.append((self.now, case, outcome.status))
        return outcome

    def _keep(self, case: Case, seconds: float) -> None:
        if case.backend in ("engine", "compiled", "compiled_max_autotune"):
            self.kept_s[case] = self.kept_s.get(case, 0.0) + 0.8 * seconds

    def probe(
        self,
        device: str,
        skip: Sequence[str],
        timeout_s: float,
        heard: Callable[[dict[str, Any]], None],
    ) -> Outcome | None:
        for name in QUESTIONS:
            if name not in skip:
                heard({"began": name})
                self.spend(QUESTION_S)
                heard({"name": name, "answer": {"status": "pass"}})
        return None

    def trials(
        self,
        kernels: Sequence[str],
        modes: Sequence[str],
        device: str,
        skip: Sequence[str],
        timeout_s: float,
        heard: Callable[[dict[str, Any]], None],
    ) -> Outcome | None:
        keys = [f"stem|{mode}|tile {n}" for mode in modes for n in range(10)]
        each = CHECK_S["fp16" if len(modes) == 1 else "all"] / len(keys)
        until = self.now + timeout_s
        for key in keys:
            if key in skip:
                continue
            if self.now + each > until:
                self.spend(max(0.0, until - self.now))
                return Outcome("timeout", "cut off")
            heard({"began": key})
            self.spend(each)
            heard({"key": key, "status": "pass", "error": "", "metrics": {}})
        return None

    def means(self) -> Means:
        return Means(
            lambda: self.now, self.survey, self.measure, self.trials, self.probe, self.unpack
        )

    def unpack(self, archive: Path, to: Path) -> tuple[str, dict[str, str]]:
        raise ValueError(f"{archive} was made for other kernels")

    def run(self, root: Path, *flags: str) -> tuple[int, str]:
        """A command on a machine that has just been started; its exit code and its words."""
        self.now = 0.0
        words = ["gpu-plan", "--results", str(root), "--no-report", *flags]
        if self.archive is not None:
            words += ["--archive", str(self.archive)]
        args = cli.parser().parse_args(words)
        console = Console(width=400, record=True, quiet=False, file=_Nowhere(), markup=False)
        code = -1
        with contextlib.suppress(KeyboardInterrupt, SystemExit, Killed):
            code = gpu_plan_command.go(
                args, gpu_plan_command.chosen_steps(args), console, self.means()
            )
        return code, console.export_text()


class _Nowhere:
    """A terminal whose output is dropped."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False
