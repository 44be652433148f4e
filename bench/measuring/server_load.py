"""Scenario server: queries arrive at random moments, whether or not a stream is free, and wait
their turn. A latency counts from the scheduled arrival, so waiting is part of it however late the
streams are: a harness that asks for the next one once the last is answered would never see a queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from resfuse.bench.common.errors import CannotServe
from resfuse.bench.measuring.arrivals import (
    LATE_SHARE,
    LEAST_QUERIES,
    most_late,
    poisson_arrivals,
    query_count,
)
from resfuse.bench.measuring.queries import Answered
from resfuse.bench.measuring.served_network import ServedNetwork

# A query that waited longer for a stream ends the run: of a queue that only grows, percentiles say
# how long it was watched, and nothing else.
LONGEST_WAIT_MS, LONGEST_WAIT_TIMES = 10e3, 20.0  # the more of both; times a query alone
# How long after the last arrival the last answer may come: more is a queue that has grown. A share
# of the run, and what a pause of the machine takes.
DRAIN_SHARE, DRAIN_S = 0.05, 0.1
ALONE = 10  # queries, one after the other
# Halvings of [0, streams' rate]: the answer is within a 32nd of that rate.
SEARCH_STEPS = 5


@dataclass(frozen=True)
class Served:
    qps: float
    latencies_ms: tuple[float, ...]  # from the scheduled arrival, one a query
    answered_per_s: float


def serve_at(network: ServedNetwork, qps: float, seconds: float, seed: int) -> Served:
    """Lets queries arrive at a rate, for so many seconds and at least LEAST_QUERIES.

    Raises:
        CannotServe: the streams do not keep up.
    """
    arrivals_ns = poisson_arrivals(qps, query_count(qps, seconds), seed)
    longest_ms = max(LONGEST_WAIT_MS, LONGEST_WAIT_TIMES * alone_ms(network))
    answered, ended = network.serve_arrivals(
        arrivals_ns, lambda waited_ms, latency_ms: waited_ms > longest_ms
    )
    last_s = _end_s(answered, arrivals_ns)
    rate = len(answered) / last_s
    arrived_s = arrivals_ns[-1] / 1e9
    if ended or last_s - arrived_s > DRAIN_S + DRAIN_SHARE * arrived_s:
        raise CannotServe(
            f"it cannot keep up with {qps:g} queries/s: it answers {_number(rate)} a second, so "
            "the queue grows for as long as they come"
        )
    return Served(qps, tuple(one.latency_ms for one in answered), rate)


def serve_most(
    network: ServedNetwork, bound_ms: float, seconds: float, seed: int, limit_s: float
) -> Served:
    """Searches for the highest rate at which the 99th percentile keeps the bound, by halving.

    Args:
        limit_s: what the case may take.

    Raises:
        CannotServe: no rate that was tried does, or the search would take too long.
    """
    alone = alone_ms(network)
    if alone > bound_ms:
        raise CannotServe(
            f"no rate keeps p99 under {bound_ms:g} ms: a query takes {alone:.3g} ms when it is "
            "alone"
        )
    rate = network.settle_round()
    needed_s = sum(LEAST_QUERIES / rate / (1 - 0.5**step) for step in range(1, SEARCH_STEPS + 1))
    if needed_s > limit_s:
        raise CannotServe(
            f"the search takes up to {needed_s:.0f} s at {_number(rate)} queries/s, more than "
            f"--timeout {limit_s:g}"
        )
    low, high, best = 0.0, rate, None
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        served = _within(network, middle, bound_ms, seconds, seed)
        if served is None:
            high = middle
        else:
            low, best = middle, served
    if best is None:
        raise CannotServe(
            f"no rate keeps p99 under {bound_ms:g} ms: at {_number(high)} queries/s more than "
            f"{LATE_SHARE:.0%} may take longer, and a query takes {alone:.3g} ms when it is alone"
        )
    return best


def alone_ms(network: ServedNetwork) -> float:
    """Returns the median time of a query that meets no other."""
    return median(network.serve_arrivals([0])[0][0].latency_ms for _ in range(ALONE))


def _within(
    network: ServedNetwork, qps: float, bound_ms: float, seconds: float, seed: int
) -> Served | None:
    """Serves at a rate; returns None as soon as too many queries pass the bound."""
    arrivals_ns = poisson_arrivals(qps, query_count(qps, seconds), seed)
    allowed, late = most_late(len(arrivals_ns)), 0

    def too_many(waited_ms: float, latency_ms: float) -> bool:
        nonlocal late
        late += latency_ms > bound_ms
        return late > allowed

    answered, ended = network.serve_arrivals(arrivals_ns, too_many)
    if ended or late > allowed:
        return None
    rate = len(answered) / _end_s(answered, arrivals_ns)
    return Served(qps, tuple(one.latency_ms for one in answered), rate)


def _number(rate: float) -> str:
    return f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"


def _end_s(answered: list[Answered], arrivals_ns: Sequence[int]) -> float:
    """Returns when the last answer came, in seconds from when arrivals are counted."""
    return max(arrivals_ns[one.number] / 1e9 + one.latency_ms / 1e3 for one in answered)
