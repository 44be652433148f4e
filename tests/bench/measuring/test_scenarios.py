"""Throughput and server: every query answered once, rightly, and counted from its arrival.

No test asserts how fast anything is; a backend that sleeps bounds latencies from below.
"""

import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, Backend
from resfuse.bench.backends.streams import Answer, CallerStreams, Query, Take
from resfuse.bench.common.errors import CannotServe
from resfuse.bench.measuring import (
    arrivals,
    correctness,
    measure_case,
    measure_server,
    network,
    queries,
)
from resfuse.bench.measuring import server_load as server
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.inference import answers
from resfuse.bench.measuring.served_network import ServedNetwork, round_seconds, torch_threads
from resfuse.bench.records.case import Case, Options
from resfuse.kernels.cpu.cpus import usable
from resfuse.resnet_ref import models

CASE = Case("tiny", "eager", "inference", "cpu", "float32", "contiguous", 2, 32)
SLEEP_S = 0.02
Run = Callable[[Tensor], Tensor]


def tiny() -> nn.Module:
    """Answers two images differently, in a millisecond."""
    layers = nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).eval()


@pytest.fixture(autouse=True)
def _one_thread_and_a_tiny_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in (models.MODELS, models.CIFAR):
        monkeypatch.setitem(registry, "tiny", lambda device=None: tiny().to(device))
    with torch_threads(1):  # as share_cores leaves it
        yield


def served(
    monkeypatch: pytest.MonkeyPatch, build: str | Callable[..., object] = "eager", cores: int = 2
) -> ServedNetwork:
    """A network that is set up, with its answers known."""
    if callable(build):
        monkeypatch.setitem(BACKENDS, "planted", Backend("a:b", "planted"))
        monkeypatch.setattr(
            "resfuse.bench.backends.load",
            lambda target: build if target == "a:b" else pytest.fail(target),
        )
    name = "planted" if callable(build) else build
    batches = [torch.randn(2, 3, 32, 32) for _ in range(network.TIMED_BATCHES + 1)]
    model = tiny()
    made = ServedNetwork(name, "contiguous", deepcopy(model), batches, cores)
    made.set_up()
    made.expect(answers(model, batches, "ieee"))
    return made


def slow(model: nn.Module, example: Tensor) -> Run:
    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        time.sleep(SLEEP_S)
        answer: Tensor = model(images)
        return answer

    return run


def one_of_two_is_wrong(since: Callable[[], bool]) -> Callable[[nn.Module, Tensor], Run]:
    """Builds a right run, and then one that is 1 % off once `since` says so."""
    built = []

    def build(model: nn.Module, example: Tensor) -> Run:
        number = len(built)
        built.append(model)

        @torch.inference_mode()
        def run(images: Tensor) -> Tensor:
            answer: Tensor = model(images)
            return answer * 1.01 if number == 1 and since() else answer

        return run

    return build


def test_a_round_answers_every_query_once_and_counts_those_that_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidate = served(monkeypatch)
    step = candidate.timed()
    step.prepare()
    exchange = step.run(lambda: None)
    numbers = [one.number for one in exchange.answered]
    assert sorted(numbers) == list(range(candidate.batches_a_round))
    assert all(one.latency_ms > 0 for one in exchange.answered)
    laps, _ = timing.interleave([step, served(monkeypatch).timed()], "cpu", 0.0, 4, 4)
    assert len(laps[0]) == 4
    assert len(candidate.latencies_ms) == 4 * candidate.batches_a_round


def test_a_round_has_as_many_queries_as_it_has_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = served(monkeypatch)
    candidate.settle_round(0.0)
    least = candidate.batches_a_round
    candidate.settle_round(0.05)
    assert candidate.batches_a_round > least == 2 * candidate.count
    assert [round_seconds(s) for s in (0.1, 1.2, 60.0)] == pytest.approx([0.05, 0.1, 0.25])


def test_every_stream_is_a_thread_of_its_own_on_one_cpu_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where torch has more in the thread that the harness runs in."""
    seen = set()

    def build(model: nn.Module, example: Tensor) -> Run:
        def run(images: Tensor) -> Tensor:
            seen.add((threading.get_ident(), torch.get_num_threads()))
            with torch.inference_mode():
                answer: Tensor = model(images)
            return answer

        return run

    with torch_threads(3):
        candidate = served(monkeypatch, build, cores=3)
        candidate.check(0, "before timing")
        assert torch.get_num_threads() == 3
    assert candidate.count == 3
    assert len(seen) == 3 and {threads for _, threads in seen} == {1}


def test_a_stream_that_is_wrong_is_caught_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = served(monkeypatch, one_of_two_is_wrong(lambda: True))
    with pytest.raises(correctness.WrongAnswer, match="against fp64 before timing"):
        candidate.check(0, "before timing")


@pytest.mark.parametrize("kept_bytes", [queries.KEPT_BYTES, 0])
def test_an_answer_that_turns_wrong_in_a_timed_round_is_caught(
    monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    """Both where copies are kept, and where there are too many of them."""
    monkeypatch.setattr(queries, "KEPT_BYTES", kept_bytes)
    timed = threading.Event()
    candidate = served(monkeypatch, one_of_two_is_wrong(timed.is_set))
    candidate.check(0, "before timing")
    step = candidate.timed()
    for is_timed in (False, True):
        if is_timed:
            timed.set()
            candidate.batches_a_round = 40  # some are for the second stream
        step.prepare()
        exchange = step.run(lambda: None)
        if not is_timed:
            step.verify(exchange)
    with pytest.raises(correctness.WrongAnswer, match="in a timed round"):
        step.verify(exchange)
    with pytest.raises(correctness.WrongAnswer, match="in a timed round"):
        candidate.serve_arrivals([0] * 40)


def test_memory_that_is_handed_out_again_without_being_written_to_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(model: nn.Module, example: Tensor) -> Run:
        kept: dict[bytes, Tensor] = {}  # of an input that was seen, the memory of its answer

        @torch.inference_mode()
        def run(images: Tensor) -> Tensor:
            key = images.numpy().tobytes()
            if key not in kept:
                kept[key] = model(images)
            return kept[key]

        return run

    candidate = served(monkeypatch, build)
    candidate.check(0, "before timing")
    with pytest.raises(correctness.WrongAnswer, match="relative error nan"):
        candidate.check(0, "before timing")


class Careless:
    """Streams that answer each query so many times."""

    count, takers = 2, 1

    def __init__(self, run: Run, times: int) -> None:
        self._run, self._times = run, times

    def serve(self, take: Take, answer: Answer) -> None:
        while (query := take(0)) is not None:
            for _ in range(self._times if query.number == 1 else 1):
                answer(query, self._run(query.images))
            if self._times == 1 and query.number == 1:
                return


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (0, "of 4 queries 1 were not answered"),
        (1, "the streams took 2 of 4 queries"),
        (2, "and 1 more than once"),
    ],
)
def test_queries_that_are_dropped_or_answered_twice_are_caught(
    monkeypatch: pytest.MonkeyPatch, times: int, said: str
) -> None:
    def streams(model: nn.Module, example: Tensor, cores: int) -> Careless:
        return Careless(torch.inference_mode()(model), times)

    monkeypatch.setitem(BACKENDS, "planted", Backend("none:none", "planted", streams="a:b"))
    monkeypatch.setattr("resfuse.bench.backends.load", lambda target: streams)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    model = tiny()
    candidate = ServedNetwork("planted", "contiguous", deepcopy(model), batches, 2)
    candidate.set_up()
    candidate.expect(answers(model, batches, "ieee"))
    step = candidate.timed()
    step.prepare()
    with pytest.raises(correctness.WrongAnswer, match=said):
        step.verify(step.run(lambda: None))


def test_a_stream_that_fails_ends_the_others() -> None:
    """And is what is raised: the others did not fail."""
    taken = []

    def take(taker: int) -> Query:
        taken.append(taker)
        return Query(len(taken), torch.zeros(1))

    def fails(images: Tensor) -> Tensor:
        if len(taken) > 10:
            raise ArithmeticError("planted")
        return images

    with pytest.raises(ArithmeticError, match="planted"):
        CallerStreams([fails, lambda images: images]).serve(take, lambda query, output: None)


def test_a_latency_counts_from_the_scheduled_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream, and five queries at once: the fifth has waited for four."""
    candidate = served(monkeypatch, slow, cores=1)
    answered, ended = candidate.serve_arrivals([0] * 5)
    assert not ended
    latencies = {one.number: one.latency_ms for one in answered}
    assert all(latencies[number] >= 1e3 * SLEEP_S * (number + 1) for number in range(5))


def test_no_query_is_taken_before_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = served(monkeypatch)
    arrivals_ns = [0, 0, 30_000_000, 60_000_000]
    answered, _ = candidate.serve_arrivals(arrivals_ns)
    assert sorted(one.number for one in answered) == [0, 1, 2, 3]
    begun = {one.number: one.begun_ns for one in answered}
    assert [begun[number] - begun[0] for number in range(4)] == arrivals_ns
    assert all(one.latency_ms > 0 for one in answered)  # else it was answered before it came


def test_arrivals_are_poissons_and_those_of_their_seed() -> None:
    moments = arrivals.poisson_arrivals(200.0, 20_000, seed=3)
    assert moments == arrivals.poisson_arrivals(200.0, 20_000, seed=3)
    assert moments != arrivals.poisson_arrivals(200.0, 20_000, seed=4)
    gaps = [b - a for a, b in zip([0, *moments], moments, strict=False)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(5e6, rel=0.03)
    # exponential: the median is ln 2 of the mean, and the spread is the mean
    assert median(gaps) == pytest.approx(0.693 * mean, rel=0.05)


def test_how_many_queries_are_enough_and_how_many_may_be_late() -> None:
    """459 without one late, and 662 with one: what LoadGen's early stopping says of 99 %."""
    assert [arrivals.most_late(n) for n in (1, 458, 459, 661, 662)] == [-1, -1, 0, 0, 1]
    assert arrivals.most_late(270_336) == pytest.approx(2583, abs=1)
    assert arrivals.query_count(1.0, 2.0) == 662
    assert arrivals.query_count(1000.0, 2.0) == 2000


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 queries, of which one may be late."""
    monkeypatch.setattr(server, "query_count", lambda qps, seconds: 40)
    monkeypatch.setattr(server, "most_late", lambda count: 1)


@pytest.mark.usefixtures("few")
def test_a_rate_that_streams_keep_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DRAIN_S", 1e9)  # whatever else this machine is doing
    found = server.serve_at(served(monkeypatch), 200.0, 1.0, seed=0)
    assert (found.qps, len(found.latencies_ms)) == (200.0, 40)
    assert min(found.latencies_ms) > 0


@pytest.mark.usefixtures("few")
def test_a_rate_that_streams_do_not_keep_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams of 20 ms answer 100 queries in a second, and never 1000."""
    with pytest.raises(CannotServe, match=r"cannot keep up with 1000 queries/s: it answers \d"):
        server.serve_at(served(monkeypatch, slow), 1000.0, 1.0, seed=0)
    monkeypatch.setattr(server, "DRAIN_S", 1e9)
    monkeypatch.setattr(server, "LONGEST_WAIT_MS", 50.0)
    monkeypatch.setattr(server, "LONGEST_WAIT_TIMES", 0.0)
    with pytest.raises(CannotServe, match="cannot keep up"):
        server.serve_at(served(monkeypatch, slow), 1000.0, 1.0, seed=0)


@pytest.mark.usefixtures("few")
def test_the_search_finds_a_rate_that_keeps_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bound_ms = 5000.0
    found = server.serve_most(served(monkeypatch), bound_ms, 0.1, 0, 1e6)
    assert found.qps > 0
    assert sum(ms > bound_ms for ms in found.latencies_ms) <= 1
    assert len(found.latencies_ms) == 40


@pytest.mark.usefixtures("few")
def test_the_search_halves_towards_the_rate_at_which_queries_get_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def within(network: object, qps: float, *rest: object) -> server.Served | None:
        tried.append(qps)
        return server.Served(qps, (1.0,), qps) if qps <= 0.3 * rate else None

    candidate = served(monkeypatch)
    rate = 64.0
    monkeypatch.setattr(candidate, "settle_round", lambda: rate)
    monkeypatch.setattr(server, "_within", within)
    found = server.serve_most(candidate, 1e4, 0.1, 0, 1e6)
    assert tried == [32.0, 16.0, 24.0, 20.0, 18.0]
    assert found.qps == 18.0


@pytest.mark.usefixtures("few")
def test_a_bound_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = served(monkeypatch, slow)
    with pytest.raises(CannotServe, match=r"p99 under 10 ms: a query takes .* when it is alone"):
        server.serve_most(candidate, 10.0, 0.1, 0, 1e6)
    with pytest.raises(CannotServe, match=r"takes up to \d+ s at .* more than --timeout 1"):
        server.serve_most(candidate, 1e4, 0.1, 0, 1.0)
    monkeypatch.setattr(server, "_within", lambda *rest: None)
    with pytest.raises(CannotServe, match=r"no rate keeps p99 under 10000 ms: at .* may take"):
        server.serve_most(candidate, 1e4, 0.1, 0, 1e6)


@pytest.mark.usefixtures("few")
def test_a_rate_with_too_many_late_queries_is_given_up_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidate = served(monkeypatch, slow)
    assert server._within(candidate, 1000.0, 30.0, 0.1, 0) is None
    asked = []
    serve = candidate.serve_arrivals

    def counted(*given: object) -> object:
        answered, ended = serve(*given)  # type: ignore[arg-type]
        asked.append(len(answered))
        return answered, ended

    monkeypatch.setattr(candidate, "serve_arrivals", counted)
    assert server._within(candidate, 1000.0, 30.0, 0.1, 0) is None
    assert asked[0] < 40


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_throughput(threads: int) -> None:
    case = Case(**{**vars(CASE), "scenario": "throughput", "backend": "fused",
                   "memory_format": "channels_last"})  # fmt: skip
    options = Options(seconds=0.2, threads=threads)
    outcome, span_s = measure_case.measure(case, options, {}, lambda event: None)
    assert outcome.status == "pass", outcome
    found = outcome.metrics
    assert found["streams"] == min(threads, usable())
    assert found["queries"] % (found["rounds"] * found["streams"]) == 0
    assert found["queries"] >= 2 * found["rounds"] * found["streams"]
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    assert 0 < found["speedup_ci_low"] <= found["speedup"] <= found["speedup_ci_high"]
    # what all streams answered together cannot have taken longer than the rounds did
    seconds = found["queries"] * case.batch_size / found["infer_samples_per_sec"]
    assert seconds < 1.5 * span_s
    assert found["qps"] is None and found["arrival_seed"] is None


@pytest.mark.usefixtures("few")
def test_a_row_of_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DRAIN_S", 1e9)
    case = Case(**{**vars(CASE), "scenario": "server", "qps": 100.0})
    options = Options(seconds=0.2, threads=2, seed=7)
    outcome, _ = measure_server.measure_server(case, options, {}, lambda event: None)
    assert outcome.status == "pass", outcome
    found = outcome.metrics
    assert (found["qps"], found["queries"], found["arrival_seed"]) == (100.0, 40, 7)
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    assert found["infer_batch_size"] == 2
    for name in ("speedup", "baseline_p50_ms", "break_even_images", "rounds", "ended_by"):
        assert found[name] is None


@pytest.mark.usefixtures("few")
def test_what_cannot_be_served_is_a_row_without_numbers() -> None:
    case = Case(**{**vars(CASE), "scenario": "server", "latency_bound_ms": 1e-6})
    outcome, _ = measure_server.measure_server(case, Options(threads=2), {}, lambda event: None)
    assert outcome.status == "fail_to_run"
    assert outcome.error.startswith("no rate keeps p99 under 1e-06 ms: a query takes ")
    assert not outcome.metrics


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", [n for n, one in BACKENDS.items() if one.streams is not None])
def test_the_streams_of_every_backend_answer_rightly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        {"onnxrt": "onnxruntime"}.get(name, name if name == "openvino" else "torch")
    )
    candidate = served(monkeypatch, name)
    assert candidate.count >= 1
    for batch in range(network.TIMED_BATCHES + 1):
        candidate.check(batch, "before timing")
    step = candidate.timed()
    for _ in range(3):
        step.prepare()
        step.verify(step.run(lambda: None))
    answered, _ = candidate.serve_arrivals(arrivals.poisson_arrivals(100.0, 20, 0))
    assert len(answered) == 20

    def wrong(batch: int, output: object) -> None:
        raise correctness.WrongAnswer("planted")

    monkeypatch.setattr(queries, "KEPT_BYTES", 0)
    monkeypatch.setattr(candidate, "_require", wrong)
    with pytest.raises(correctness.WrongAnswer, match="planted"):
        candidate.serve_arrivals([0] * 8)


class Pair(nn.Module):
    """Answers with a dictionary of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny(), tiny()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": self.first(x), "other": self.second(x)}


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["onnxrt", "openvino", "engine"])
def test_streams_of_a_network_with_several_outputs(name: str) -> None:
    pytest.importorskip(
        {"onnxrt": "onnxruntime"}.get(name, name if name == "openvino" else "torch")
    )
    batches = [torch.randn(2, 3, 32, 32) for _ in range(network.TIMED_BATCHES + 1)]
    model = Pair().eval()
    candidate = ServedNetwork(name, "contiguous", deepcopy(model), batches, 2)
    candidate.set_up()
    candidate.expect(answers(model, batches, "ieee"))
    for batch in range(network.TIMED_BATCHES + 1):
        candidate.check(batch, "before timing")
    swapped = answers(model, [one.roll(1, 0) for one in batches], "ieee")
    candidate.expect(swapped)
    with pytest.raises(correctness.WrongAnswer):
        candidate.check(0, "before timing")
