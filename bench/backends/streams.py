"""Streams: several batches answered at the same time on the cores of a CPU, for the scenarios
throughput and server.

A backend's `streams(model, example, cores) -> Streams` is what its makers recommend for throughput.
The streams take queries when they are idle, instead of being given them: so no other thread has to
run in order that they are busy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor

from resfuse.bench.common.callers import caller, together

Run = Callable[[Tensor], Any]


@dataclass(frozen=True, eq=False)
class Query:
    """A batch that is to be answered once. What it holds, nothing else says."""

    number: int
    images: Tensor  # [N, C, H, W]; the stream's own until it has answered


# The taker's number -> its next query, once there is one; None: there will be none.
Take = Callable[[int], Query | None]
Answer = Callable[[Query, Any], None]  # what came out; it is copied at once


class Streams(Protocol):
    """What answers queries.

    `count`: so many at the same time. `takers`: as many threads take them, numbered from 0.
    """

    count: int
    takers: int

    def serve(self, take: Take, answer: Answer) -> None:
        """Answers what `take` gives until it gives None to each taker, and returns when all of it
        is answered. A failure of a stream, of `take` or of `answer` ends all streams and is
        raised."""


class CallerStreams:
    """Python threads, each calling a function on one thread of the CPU. Functions that may be
    called from several threads can be one and the same."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self.count = self.takers = len(runs)
        self._threads = [caller(_one_thread) for _ in runs]

    def serve(self, take: Take, answer: Answer) -> None:
        ended = Event()

        def call(number: int) -> None:
            run = self._runs[number]
            try:
                while not ended.is_set() and (query := take(number)) is not None:
                    answer(query, run(query.images))
            except BaseException:
                ended.set()
                raise

        together(self._threads, call)


def _one_thread() -> None:
    """OpenMP counts its threads by calling thread; torch passes its own count on to a new one only
    before that has set one."""
    torch.set_num_threads(1)
