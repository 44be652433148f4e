"""What is on the clock and what is not; the GPU's stopwatch on a stand-in for its events."""

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.clock.timing import ClockError, Span, Step, interleave, seconds


def sleeper(run_s: float, prepare_s: float = 0.0, calls: list[str] | None = None, name: str = ""):
    def run(lap):
        time.sleep(run_s)
        if calls is not None:
            calls.append(name)
        return torch.zeros(1)

    return Step(lambda: time.sleep(prepare_s), run, lambda output: time.sleep(prepare_s))


def test_preparation_and_verification_are_off_the_clock() -> None:
    """A run of 2 ms between two sleeps of 20 ms: were one of them timed, it would show tenfold."""
    laps, span = interleave([sleeper(0.002, 0.02)], "cpu", 0.0, 3, 3)
    assert all(2 <= lap[0] < 15 for lap in laps[0])
    assert span.ms > 7 * 40  # two warm-up rounds, three timed runs in two turns of their own


def test_steps_take_turns_and_the_order_turns_around() -> None:
    calls: list[str] = []
    steps = [sleeper(0, calls=calls, name="A"), sleeper(0, calls=calls, name="B")]
    interleave(steps, "cpu", 0.0, 4, 4)
    assert "".join(calls) == "ABAB" + "AAABBB" + "BBBAAA"


def test_rounds_follow_the_budget_between_their_limits() -> None:
    assert len(interleave([sleeper(0.01)], "cpu", 0.5, 2, 100)[0][0]) in range(4, 51)
    assert len(interleave([sleeper(0.01)], "cpu", 0.0, 4, 100)[0][0]) == 4
    assert len(interleave([sleeper(0.001)], "cpu", 9.0, 2, 7)[0][0]) == 7  # an odd number


def test_phases_become_laps() -> None:
    def run(lap):
        time.sleep(0.001)
        lap()
        time.sleep(0.004)
        return torch.zeros(1)

    laps, _ = interleave([Step(lambda: None, run, lambda output: None)], "cpu", 0, 2, 2)
    assert [len(lap) for lap in laps[0]] == [2, 2]
    assert all(first >= 1 and second >= 4 for first, second in laps[0])  # a sleep is no shorter


def test_clocks_that_disagree_are_an_error() -> None:
    assert seconds(Span(100.0, 104.0)) == pytest.approx(0.1)
    with pytest.raises(ClockError, match=r"100\.0 ms where another saw 150\.0 ms"):
        seconds(Span(100.0, 150.0))


class FakeEvent:
    """Stands in for torch.cuda.Event where there is no GPU: a mark every 5 ms."""

    device_ms = 5.0
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += FakeEvent.device_ms
        self.at = FakeEvent.now

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Events and synchronisation of a GPU, faked; returns the synchronisations in order."""
    synchronised: list[str] = []
    monkeypatch.setattr(timing, "_event", FakeEvent)
    monkeypatch.setattr(timing, "_synchronize", lambda: synchronised.append("sync"))
    return synchronised


def test_gpu_time_comes_from_events_after_a_synchronisation(fake_gpu: list[str]) -> None:
    watch = timing.CudaStopwatch()
    assert fake_gpu == ["sync"]  # nothing queued before may run on this watch
    watch.mark()
    watch.mark()
    assert watch.laps() == [5.0]
    assert fake_gpu == ["sync", "sync"]


def test_work_that_outlives_its_events_is_an_error(fake_gpu: list[str]) -> None:
    """Events of one stream that say 5 ms while the host waits 40: work on another stream."""
    with pytest.raises(ClockError, match=r"5\.000 ms by its stopwatch and 4\d"):
        interleave([sleeper(0.04)], "cuda", 0, 3, 3)
    laps, _ = interleave([sleeper(0.0052)], "cuda", 0, 3, 3)
    assert laps[0] == [[5.0]] * 3


def test_what_is_queued_ahead_is_in_nobodys_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the input is set out, and before the clock starts."""
    order: list[str] = []

    def clock() -> int:
        order.append("clock")
        return time.perf_counter_ns()

    def run(lap: Callable[[], None]) -> torch.Tensor:
        order.append("run")
        return torch.zeros(1)

    monkeypatch.setattr(timing, "_clock_ns", clock)
    step = Step(
        lambda: order.append("prepare"), run, lambda y: order.append("verify"),
        lambda: order.append("ahead"),
    )  # fmt: skip
    interleave([step], "cpu", 0, 2, 2)
    # The first reading is the span's own.
    assert order[1:7] == ["prepare", "ahead", "clock", "run", "clock", "verify"]


def test_a_turn_begins_when_the_process_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three glances see a thread spin, the fourth sees none; inputs are set out after that."""
    events: list[str] = []
    spins = itertools.cycle([1.0, 1.0, 1.0, 0.0])
    cpu_s = [0.0]

    def glance(seconds: float) -> None:
        events.append("glance")
        cpu_s[0] += next(spins) * seconds

    monkeypatch.setattr(timing, "_sleep", glance)
    monkeypatch.setattr(timing, "_cpu_s", lambda: cpu_s[0])
    interleave([recorder(events)], "cpu", 0.0, 4, 4)
    run = ["prepare", "run", "verify"]
    assert events == timing.WARMUP_ROUNDS * run + 2 * (["glance"] * 4 + 3 * run)


def test_a_process_that_is_never_idle_is_timed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "_cpu_s", lambda: time.perf_counter())
    events: list[str] = []
    interleave([recorder(events)], "cpu", 0.0, 2, 2)
    assert events.count("run") == timing.WARMUP_ROUNDS + 3


def test_only_the_run_has_all_of_torchs_threads() -> None:
    threads, seen = torch.get_num_threads(), []
    step = Step(
        lambda: seen.append(torch.get_num_threads()),
        lambda lap: seen.append(torch.get_num_threads()),
        lambda output: seen.append(torch.get_num_threads()),
    )
    torch.set_num_threads(3)
    try:
        interleave([step], "cpu", 0.0, 2, 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 3, 1] * (timing.WARMUP_ROUNDS + 3)


def recorder(events: list[str]) -> Step:
    return Step(
        lambda: events.append("prepare"),
        lambda lap: events.append("run"),
        lambda output: events.append("verify"),
    )
