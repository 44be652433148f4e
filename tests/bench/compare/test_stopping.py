"""`--ci` and `--ab`: measuring ends once enough is known, and a row says what ended it."""

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from resfuse.bench.cli import main, parser
from resfuse.bench.common.statistics import paired_speedup
from resfuse.bench.measuring import measure_case
from resfuse.bench.measuring.clock.stopping import FIRST_LOOK, GROWTH, Narrow
from resfuse.bench.measuring.clock.timing import Laps, Step, interleave
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running import progress, session

CASE = Case("cifar_resnet20", "eager", "inference", "cpu", "float32", "channels_last", 1, 32)


def laps_of(rng: np.random.Generator, rounds: int, noise: float) -> Laps:
    """A candidate 1.1 times as fast as the baseline."""
    return [[[t] for t in rng.lognormal(0, noise, rounds) * ms] for ms in (1.0, 1.1)]


def first(laps: Laps, rounds: int) -> Laps:
    return [step[:rounds] for step in laps]


def test_it_looks_at_growing_sizes_only() -> None:
    """Each look is a chance to stop too early."""
    laps = laps_of(np.random.default_rng(0), 400, 0.5)
    rule, looks = Narrow(1e-6), []
    for rounds in range(1, 401):
        before = rule.look
        assert not rule(first(laps, rounds))
        if rule.look != before:
            looks.append(rounds)
    assert looks[0] == FIRST_LOOK
    assert all(b >= GROWTH * a for a, b in pairwise(looks))
    assert len(looks) == 7


def test_it_stops_by_the_interval_in_the_row() -> None:
    laps = laps_of(np.random.default_rng(1), 2000, 0.05)
    rule = Narrow(0.03)
    rounds = next(rounds for rounds in range(10, 2001, 2) if rule(first(laps, rounds)))
    candidate, baseline = ([lap[0] for lap in step[:rounds]] for step in laps)
    ratio, low, high = paired_speedup(baseline, candidate)
    assert rule.met and (high - low) / ratio < 0.03
    assert 30 < rounds < 1000  # neither at the first look nor never


def test_stopping_by_width_keeps_the_interval_honest() -> None:
    """Of 150 experiments that end as soon as they look precise, about 95 % must still cover."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(150):
        laps = laps_of(rng, 700, 0.04)
        rule, rounds = Narrow(0.03), FIRST_LOOK
        while rounds < 700 and not rule(first(laps, rounds)):
            rounds = rule.look
        candidate, baseline = ([lap[0] for lap in step[:rounds]] for step in laps)
        _, low, high = paired_speedup(baseline, candidate)
        covered += low <= 1.1 <= high
    assert covered / 150 >= 0.88


def test_interleave_ends_when_it_is_enough() -> None:
    asked = []

    def enough(laps: Laps) -> bool:
        asked.append(len(laps[0]))
        return len(laps[0]) >= 12

    step = Step(lambda: None, lambda lap: torch.zeros(1), lambda output: None)
    laps, _ = interleave([step, step], "cpu", 1e9, 10, 100, enough)
    assert [len(one) for one in laps] == [12, 12]
    assert asked == [10, 12]  # never below the least number of rounds


@pytest.mark.parametrize(
    ("options", "ended_by"),
    [
        (Options(seconds=60, max_rounds=200, ci=4.0), "interval"),
        (Options(seconds=0.01, ci=1e-6), "seconds"),
    ],
)
def test_a_row_says_what_ended_it(options: Options, ended_by: str) -> None:
    outcome, _ = measure_case.measure(CASE, options, {}, lambda event: None)
    assert outcome.status == "pass", outcome.error
    assert outcome.metrics["ended_by"] == ended_by
    line = progress.line(CASE, outcome, 0.02)
    assert f"against eager contiguous after {outcome.metrics['rounds']} rounds: " in line
    said = {"interval": "narrower than 2 %", "seconds": "the time budget ended it, "}
    assert said[ended_by] in line


def test_what_ends_a_row_without_an_interval() -> None:
    options = Options(max_rounds=12)
    assert measure_case._ended_by(Narrow(0.0), 10, options) == "seconds"
    assert measure_case._ended_by(Narrow(0.0), 12, options) == "rounds"
    assert measure_case._ended_by(Narrow(0.0, met=True), 12, options) == "interval"


def asked(*flags: str) -> argparse.Namespace:
    return parser().parse_args(["bench", *flags])


def test_ab_is_a_case_and_its_baseline() -> None:
    request = session.request_of(asked("--ab", "onnxrt,fused"))
    assert (request.baseline, request.baseline_memory_format) == ("onnxrt", "contiguous")
    assert (request.backends, request.memory_formats) == (["fused"], ["channels_last"])
    request = session.request_of(asked("--ab", "fused,eager", "--channels-last"))
    assert (request.baseline, request.baseline_memory_format) == ("fused", "channels_last")
    assert (request.backends, request.memory_formats) == (["eager"], ["channels_last"])


def test_the_interval_and_the_budget_are_the_users() -> None:
    def options(*flags: str) -> Options:
        args = asked("--device", "cpu", *flags)
        return session.options_of(args, session.request_of(args))

    assert options().ci is None
    assert options("--ab", "eager,fused").ci == 0.02
    chosen = options("--ab", "eager,fused", "--ci", "1.5%", "--seconds", "7")
    assert (chosen.ci, chosen.seconds) == (0.015, 7)
    assert options("--ci", "3%").ci == 0.03


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ab", "eager"], "--ab: 'eager'; accepted: two backends, such as eager,fused"),
        (["--ab", "eager,fused,onnxrt"], "accepted: two backends"),
        (["--ab", "e*,fused"], "accepted: two backends"),
        (["--ab", "eager,onnx"], "--ab: unknown name 'onnx'; did you mean onnxrt"),
        (["--ab", "eager,fused", "--backend", "eager"], "not allowed with argument --ab"),
        (["--ab", "eager,fused", "--baseline", "onnxrt"], "with --ab it is the first, eager"),
        (["--ci", "2"], "--ci: '2'; accepted: percentages above 0%, such as 5%"),
        (["--ci", "0%"], "--ci: '0%'; accepted: percentages"),
    ],
)
def test_bad_arguments(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--results", str(tmp_path / "r"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_failed_case_has_no_interval_to_tell() -> None:
    line = progress.line(replace(CASE, backend="fused"), Outcome("timeout", "not done"), 0.02)
    assert line.endswith("timeout: not done")
