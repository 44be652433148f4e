"""Throughput: every query of every stream is answered once, and rightly.

No test asserts how fast anything is.
"""

import threading
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, Backend
from resfuse.bench.backends.streams import Answer, CallerStreams, Query, Take
from resfuse.bench.measuring import arrivals, correctness, measure_case, network, queries
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.inference import answers
from resfuse.bench.measuring.served_network import ServedNetwork, round_seconds, torch_threads
from resfuse.bench.records.case import Case, Options
from resfuse.kernels.cpu.cpus import usable
from served_networks import CASE, Run, one_thread_and_tiny, served, tiny


@pytest.fixture(autouse=True)
def _one_thread_and_a_tiny_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with one_thread_and_tiny(monkeypatch):
        yield


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
    candidate.settle_round(0.5)  # 100 times as long as two queries take here
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


@pytest.mark.slow
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
