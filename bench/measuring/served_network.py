"""A network under the scenarios throughput and server: a backend's streams, set up, timed and
checked as `Inference` is, but with several batches at work at the same time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor, nn

from resfuse.bench.backends import load_streams
from resfuse.bench.backends.compute import Compute
from resfuse.bench.measuring import correctness
from resfuse.bench.measuring.clock.timing import Step, Watch, seconds
from resfuse.bench.measuring.correctness import Output
from resfuse.bench.measuring.inference import IN_A_ROUND, Answers
from resfuse.bench.measuring.network import MEMORY_FORMATS, TIMED_BATCHES, in_format
from resfuse.bench.measuring.queries import Answered, Asked, Exchange, GiveUp, never
from resfuse.bench.records.sample import Accuracy

# A round is so long that its end, where streams run out of work one by one, is a small part of it;
# less only where the timed seconds of a case do not allow for MIN_ROUNDS such rounds.
ROUND_S, SHORTEST_ROUND_S = 0.25, 0.05
LEAST_A_STREAM = 2  # batches in a round
MIN_ROUNDS = 6


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch use so many threads in this thread, and those it had afterwards. A stream's own
    thread has set its count already."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def round_seconds(seconds: float) -> float:
    """Returns how long a round is, for a case of so many timed seconds, its baseline's included."""
    return min(ROUND_S, max(SHORTEST_ROUND_S, seconds / (2 * MIN_ROUNDS)))


class ServedNetwork:
    """One backend's streams for one network. torch is to have one thread when it is set up."""

    phases: tuple[str, ...] = ()

    def __init__(
        self,
        backend: str,
        memory_format: str,
        model: nn.Module,
        batches: Sequence[Tensor],
        cores: int,
        compute: Compute | None = None,
    ) -> None:
        """Keeps the arguments; nothing runs yet.

        Args:
            batches: as Checked takes them.
            cores: that the streams share.
            compute: what the backend computes in; None for the model's own dtype.
        """
        self._backend, self._cores, self._compute = backend, cores, compute
        self._format = MEMORY_FORMATS[memory_format]
        self._model: nn.Module | None = in_format(model, memory_format)
        self._batches = batches
        self._answers: Answers | None = None
        self._poisoned: list[bool] = []
        self._rolled = 0
        self._last_ms: list[float] = []
        self.latencies_ms: list[float] = []  # of the rounds that count
        self.batches_a_round = 0

    @property
    def count(self) -> int:
        """The batches at work at the same time."""
        return self._streams.count

    def set_up(self) -> None:
        """Everything that happens once, each stream's first run included."""
        assert self._model is not None
        own = None if self._compute is None else self._compute.example(self._batches[0])
        self._first = self._batches[0] if own is None else own
        example = self._first.clone(memory_format=self._format)
        self._streams = load_streams(
            self._backend, self._model, example, self._cores, self._compute
        )
        self._model = None
        self._buffers = [torch.empty_like(example) for _ in range(self.count)]
        self.batches_a_round = LEAST_A_STREAM * self.count
        self.step_once()

    def explain(self) -> str:
        return ""

    def expect(self, answers: Answers) -> None:
        self._answers = answers
        self._poisoned = [not same for same in answers.constant()]

    def step_once(self) -> None:
        """Every stream answers a batch."""
        self._serve(self._of_each(0, self._first, lambda batch, output: None))

    def check(self, batch: int, when: str) -> Accuracy:
        """Lets every stream answer a batch; returns how accurate the worst answer was.

        Raises:
            WrongAnswer: one is not within the limit of the reference.
        """
        assert self._answers is not None
        answers, found = self._answers, list[Accuracy]()

        def verify(number: int, output: Output) -> None:
            found.append(answers.accuracy(output, number, when))

        self._serve(self._of_each(batch, self._batches[batch], verify)).settle()
        return correctness.worst(found)

    def settle_round(self, least_s: float = ROUND_S) -> float:
        """Decides how many batches a round has, by timing some, so that it takes `least_s`.

        Returns:
            how many batches are answered in a second.
        """
        step = self.timed()
        for is_timed in (False, True):
            step.prepare()
            watch = Watch()
            answered = step.run(lambda: None)
            span_s = seconds(watch.elapsed())
            step.verify(answered)
            rate = self.batches_a_round / span_s
            if not is_timed:  # the first one is cold; the second has about the right length
                self._set_length(rate, least_s)
        self._set_length(rate, least_s)
        return rate

    def timed(self) -> Step:
        """Returns a step that is a round: so many batches that each stream has several."""
        return self._round(lambda: self._drawn(self.batches_a_round), self._require)

    def unseen(self) -> Step:
        """Returns a round of inputs that never come twice: the last batch, further rolled each
        time."""
        return self._round(self._new, self._require_finite)

    def serve_arrivals(
        self, arrivals_ns: Sequence[int], give_up: GiveUp = never
    ) -> tuple[list[Answered], bool]:
        """Serves batches that arrive at these moments, in ns from now on, each by the first stream
        that is free.

        Returns:
            the answers, all of them right; whether it was given up before the last.

        Raises:
            WrongAnswer: one is not within the limit of the reference.
        """
        asked = self._drawn(len(arrivals_ns))
        exchange = Exchange(
            asked, self._buffers, self._require, self._poisoned,
            arrivals_ns=arrivals_ns, give_up=give_up,
        )  # fmt: skip
        self._serve(exchange).settle()
        return exchange.answered, exchange.ended

    def _round(
        self, draw: Callable[[], list[Asked]], verify: Callable[[int, Output], None]
    ) -> Step:
        asked: list[Asked] = []

        def prepare() -> None:
            asked[:] = draw()

        def run(lap: Callable[[], None]) -> Exchange:
            return self._serve(Exchange(asked, self._buffers, verify, self._poisoned))

        def settle(exchange: Exchange) -> None:
            exchange.settle()
            self._last_ms = [one.latency_ms for one in exchange.answered]

        def counted() -> None:
            self.latencies_ms += self._last_ms

        return Step(prepare, run, settle, counted=counted)

    def _serve(self, exchange: Exchange) -> Exchange:
        self._streams.serve(exchange.take, exchange.answer)
        return exchange

    def _of_each(
        self, batch: int, images: Tensor, verify: Callable[[int, Output], None]
    ) -> Exchange:
        """The same images for every stream."""
        asked = [Asked(batch, images)] * self.count
        share = self.count // self._streams.takers
        return Exchange(asked, self._buffers, verify, self._poisoned, share=share)

    def _set_length(self, rate: float, least_s: float) -> None:
        of_each = max(LEAST_A_STREAM, ceil(rate * least_s / self.count))
        self.batches_a_round = of_each * self.count

    def _drawn(self, count: int) -> list[Asked]:
        """Timed batches in random order."""
        numbers: list[int] = torch.randint(TIMED_BATCHES, (count,)).tolist()
        return [Asked(number, self._batches[number]) for number in numbers]

    def _new(self) -> list[Asked]:
        last = len(self._batches) - 1
        asked = []
        for _ in range(self.batches_a_round):
            self._rolled += 1
            asked.append(Asked(last, self._batches[last].roll(self._rolled, -1)))
        return asked

    def _require(self, batch: int, output: Output) -> None:
        assert self._answers is not None
        self._answers.require(output, batch, IN_A_ROUND)

    def _require_finite(self, batch: int, output: Output) -> None:
        """Their answers are not known; the last batch's own, not rolled, is checked afterwards."""
        assert self._answers is not None
        self._answers.require_finite(output)
