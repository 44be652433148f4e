"""A network or layer under inference: how it is set up, timed a batch at a time, and checked."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from resfuse.bench.backends import load_build
from resfuse.bench.measuring import correctness as check
from resfuse.bench.measuring.clock.timing import Step
from resfuse.bench.measuring.network import MEMORY_FORMATS, TIMED_BATCHES, in_format
from resfuse.bench.records.sample import Accuracy


@dataclass(frozen=True)
class Answers:
    """The right outputs and the largest error an output may have, one entry a batch."""

    reference: list[Tensor]  # fp64, [N, classes]
    eager: list[Tensor]  # the case's precision
    limit: check.Limit


def answers(model: nn.Module, batches: Sequence[Tensor], math_mode: str) -> Answers:
    """Runs eager and the fp64 reference of the same weights on all batches.

    Raises:
        WrongAnswer: the network answers all batches alike, so that nothing could be checked.
    """
    with torch.inference_mode():
        eager = [model(images) for images in batches]
        twin = deepcopy(model).double()
        reference = [check.in_chunks(twin, images.double()) for images in batches]
    errors = [check.relative_error(y, ref) for y, ref in zip(eager, reference, strict=True)]
    limit = check.Limit.from_eager(max(errors), math_mode)
    check.require_telling(reference, limit)
    return Answers(reference, eager, limit)


class Checked:
    """Something that maps a batch to its answer; owns the buffer its inputs are written to.

    The batches take turns in that one buffer, so an output remembered by the input's address is
    wrong the next time; the output of each round is filled with NaN before the next, so a buffer
    that is not written to is found out.
    """

    phases: tuple[str, ...] = ()

    def __init__(
        self,
        build: Callable[[Tensor], Callable[[Tensor], Tensor]],
        memory_format: str,
        batches: Sequence[Tensor],
    ) -> None:
        """Keeps the arguments; nothing runs yet.

        Args:
            build: makes what runs, given an example of its input.
            memory_format: of that input.
            batches: inputs [N, ...]: the timed ones, and one more for afterwards.
        """
        self._build = build
        self._batches = batches
        self._images = batches[0].clone(memory_format=MEMORY_FORMATS[memory_format])
        self._output: Tensor | None = None
        self._turn = 0
        self._rolled = 0
        self._answers: Answers | None = None

    def set_up(self) -> None:
        """Everything that happens once; the first run compiles and tunes, so it belongs here."""
        self._run = self._build(self._images)
        del self._build  # and with it the model, where what runs does not need it
        self.step_once()

    def explain(self) -> str:
        """Returns what the backend says of its own plan, as an engine can, or ""."""
        told = getattr(self._run, "explain", None)
        return str(told(self._images.shape[0])) if callable(told) else ""

    def expect(self, answers: Answers) -> None:
        self._answers = answers

    def step_once(self) -> None:
        self._output = self._run(self._images)

    def check(self, batch: int, when: str) -> Accuracy:
        """Runs one batch through the timed buffer.

        Raises:
            WrongAnswer: the output is not within the limit of the reference.
        """
        assert self._answers is not None
        self._set_out(batch)
        output = check.require_tensor(self._run(self._images), self._answers.eager[batch])
        self._output = output
        found = check.accuracy(output, self._answers.reference[batch], self._answers.eager[batch])
        check.require_right(found.rel_l2, self._answers.limit, when, found)
        return found

    def timed(self) -> Step:
        return Step(self._prepare, self._timed_run, self._verify)

    def unseen(self) -> Step:
        """Returns a step on inputs that never come twice: the last batch, further rolled each
        time."""
        return Step(self._prepare_unseen, self._timed_run, self._verify_unseen)

    def _set_out(self, batch: int, rolled: int = 0) -> None:
        if self._output is not None:
            with torch.inference_mode():
                self._output.fill_(float("nan"))
        images = self._batches[batch]
        self._images.copy_(images.roll(rolled, -1) if rolled else images)

    def _prepare_unseen(self) -> None:
        self._rolled += 1
        self._set_out(len(self._batches) - 1, self._rolled)

    def _verify_unseen(self, snapshot: Tensor) -> None:
        """Their answers are not known; the last batch's own, not rolled, is checked afterwards."""
        assert self._answers is not None
        check.require_tensor(snapshot, self._answers.eager[0])
        if not torch.isfinite(snapshot).all():
            raise check.WrongAnswer("the output for a new input is not finite")

    def _prepare(self) -> None:
        self._turn = (self._turn + int(torch.randint(TIMED_BATCHES + 1, ()))) % TIMED_BATCHES
        self._set_out(self._turn)

    def _timed_run(self, lap: Callable[[], None]) -> Tensor:
        self._output = self._run(self._images)
        return self._output

    def _verify(self, snapshot: Tensor) -> None:
        assert self._answers is not None
        check.require_tensor(snapshot, self._answers.eager[self._turn])
        error = check.relative_error(snapshot, self._answers.reference[self._turn])
        check.require_right(error, self._answers.limit, "in a timed round")


class Inference(Checked):
    """One backend running one network."""

    def __init__(
        self, backend: str, memory_format: str, model: nn.Module, batches: Sequence[Tensor]
    ) -> None:
        build = partial(load_build(backend), in_format(model, memory_format))
        super().__init__(build, memory_format, batches)
