"""What is handed to a backend's streams, and what they have answered: every query once, checked.

A query's input is written into memory of the stream's own before it is run, and its output is
copied and then made wrong, all on the clock: so does a server that receives images and sends
answers. The copies are compared with the references once no stream is at work any more.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from resfuse.bench.backends.streams import Query
from resfuse.bench.measuring.clock.timing import now_ns, wait_until
from resfuse.bench.measuring.correctness import Output, WrongAnswer, outputs
from resfuse.bench.measuring.inference import poison

# Copies of answers that are kept until the streams rest. What comes beyond is checked at once by
# the stream that has answered, on the clock.
KEPT_BYTES = 256 * 2**20


# (waited for a stream, until answered; both in ms) -> whether to stop
GiveUp = Callable[[float, float], bool]


def never(waited_ms: float, latency_ms: float) -> bool:
    return False


@dataclass(frozen=True)
class Asked:
    """A query before it is taken: the number of its batch, and the images."""

    batch: int
    images: Tensor


@dataclass(frozen=True)
class Answered:
    number: int  # of the query
    batch: int
    begun_ns: int  # when it arrived, or a stream took it
    latency_ms: float
    output: Output  # a copy; None where it is checked already


class Exchange:
    """Hands out queries and collects answers; any number of threads may ask.

    Args:
        asked: the queries, in order.
        buffers: memory for inputs, as many as streams; each is lent to one query at a time.
        verify: (batch, output) -> raises WrongAnswer.
        poisoned: for each output, whether it may be overwritten.
        share: the most queries a taker gets, for all to get some.
        arrivals_ns: when each query arrives, from `began_ns` on; without, they are all there.
        give_up: asked after each answer.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        buffers: Sequence[Tensor],
        verify: Callable[[int, Output], None],
        poisoned: Sequence[bool],
        *,
        share: int | None = None,
        arrivals_ns: Sequence[int] | None = None,
        give_up: GiveUp = never,
    ) -> None:
        self._asked, self._share, self._arrivals_ns = asked, share, arrivals_ns
        self._verify, self._poisoned, self._give_up = verify, poisoned, give_up
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        self._taking, self._collecting = Lock(), Lock()
        self._next, self._bytes = 0, 0
        self._shares: Counter[int] = Counter()
        self._begun_ns: dict[int, int] = {}
        self._waits_ms: dict[int, float] = {}
        self._wrong: WrongAnswer | None = None
        self.ended = False  # before the last query was taken
        self.answered: list[Answered] = []
        self.began_ns = now_ns()

    def take(self, taker: int) -> Query | None:
        with self._taking:  # while one waits for an arrival, those behind it wait as well
            number = self._next
            if self.ended or number == len(self._asked) or self._shares[taker] == self._share:
                return None
            self._next += 1
            self._shares[taker] += 1
            begun_ns = now_ns()
            if self._arrivals_ns is not None:
                begun_ns = self.began_ns + self._arrivals_ns[number]
                wait_until(begun_ns)
        self._begun_ns[number] = begun_ns
        self._waits_ms[number] = (now_ns() - begun_ns) / 1e6
        asked = self._asked[number]
        images = self._free.get()
        images.copy_(asked.images)
        return Query(number, images)

    def answer(self, query: Query, output: Output) -> None:
        begun_ns, batch = self._begun_ns[query.number], self._asked[query.number].batch
        latency_ms = (now_ns() - begun_ns) / 1e6
        copy = _copied(output) if isinstance(output, Tensor) else tree_map(_copied, output)
        poison(output, self._poisoned)
        self._free.put(query.images)
        with self._collecting:
            self._bytes += sum(one.numel() * one.element_size() for one in outputs(copy))
            is_kept = self._bytes <= KEPT_BYTES
            if self._give_up(self._waits_ms[query.number], latency_ms):
                self.ended = True
            self.answered.append(
                Answered(query.number, batch, begun_ns, latency_ms, copy if is_kept else None)
            )
        if not is_kept:
            try:
                self._verify(batch, copy)
            except WrongAnswer as wrong:  # it is whose streams these are that says so
                self._wrong, self.ended = wrong, True

    def settle(self) -> None:
        """Checks what has been answered since.

        Raises:
            WrongAnswer: a query was not taken, not answered, or twice, or wrongly.
        """
        if self._wrong is not None:
            raise self._wrong
        if self._next < len(self._asked) and not self.ended:
            raise WrongAnswer(f"the streams took {self._next} of {len(self._asked)} queries")
        times = Counter(one.number for one in self.answered)
        if times != Counter(range(self._next)):
            lost = self._next - len(times)
            raise WrongAnswer(
                f"of {self._next} queries {lost} were not answered and "
                f"{sum(n > 1 for n in times.values())} more than once"
            )
        for one in self.answered:
            if one.output is not None:
                self._verify(one.batch, one.output)


def _copied(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
