"""Server: queries come at their own moments, and a latency counts from the arrival.

No test asserts how fast anything is; a backend that sleeps bounds latencies from below.
"""

from collections.abc import Iterator
from statistics import median

import pytest

from resfuse.bench.common.errors import CannotServe
from resfuse.bench.measuring import arrivals, measure_server
from resfuse.bench.measuring import server_load as server
from resfuse.bench.records.case import Case, Options
from served_networks import CASE, SLEEP_S, one_thread_and_tiny, served, slow


@pytest.fixture(autouse=True)
def _one_thread_and_a_tiny_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with one_thread_and_tiny(monkeypatch):
        yield


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
