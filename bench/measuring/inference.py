"""A network or layer under inference: how it is set up, timed a batch at a time, and checked."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from resfuse.bench.backends import load_build
from resfuse.bench.backends.compute import Compute
from resfuse.bench.backends.converted import in_dtype
from resfuse.bench.common.errors import CannotTake
from resfuse.bench.measuring import correctness as check
from resfuse.bench.measuring.clock.timing import Step
from resfuse.bench.measuring.correctness import Output
from resfuse.bench.measuring.fake_quantization import FakeQuantized
from resfuse.bench.measuring.network import MEMORY_FORMATS, TIMED_BATCHES, in_format
from resfuse.bench.records.sample import Accuracy

Run = Callable[[Tensor], Output]
IN_A_ROUND = "in a timed round"
# Where an error is so many times smaller than eager's, nothing was rounded as eager rounds. That of
# bfloat16 is some 10,000 times that of fp32, and one layer in it costs more than a 100th of what
# all layers do. That of int8 is larger still.
FINER = 100


@dataclass(frozen=True)
class Answers:
    """The right outputs and the largest error an output may have, one entry a batch."""

    reference: Sequence[Output]  # fp64
    eager: Sequence[Output]  # the case's precision; int8 is simulated
    limit: check.Limit
    # An error below this is that of a finer arithmetic than the case's.
    least: float = 0.0
    # What a baseline is held to that computes in fp32 beside a case in int8.
    in_fp32: "Answers | None" = None

    def of_baseline(self, compute: Compute | None) -> "Answers":
        """The answers that a baseline is held to which computes in `compute`."""
        return self.in_fp32 if compute is None and self.in_fp32 is not None else self

    def constant(self) -> list[bool]:
        """For each output, whether it is the same for all inputs, as anchors are."""
        first, *others = (check.outputs(reference) for reference in self.reference)
        return [all(torch.equal(y, one[i]) for one in others) for i, y in enumerate(first)]

    def accuracy(self, output: Output, batch: int, when: str) -> Accuracy:
        """How accurate an output is for a batch.

        Raises:
            WrongAnswer: it is not within the limit of the reference.
            CannotTake: it is too close to the reference for the case's arithmetic.
        """
        given, reference = self._tensors(output, batch), self.reference[batch]
        found = check.accuracy(given, reference, self.eager[batch])
        errors = check.relative_errors(given, reference)
        check.require_right(errors, self.limit, when, found)
        if found.rel_l2 < self.least:
            raise CannotTake(
                f"it computed in a finer precision than was asked for: a relative error of "
                f"{found.rel_l2:.2g} against fp64, where rounding alone costs "
                f"{'eager' if self.in_fp32 is None else 'int8'} {FINER * self.least:.2g}"
            )
        return found

    def require(self, output: Output, batch: int, when: str) -> None:
        """Raises WrongAnswer unless an output for a batch is within the limit of the reference."""
        given = self._tensors(output, batch)
        errors = check.relative_errors(given, self.reference[batch])
        check.require_right(errors, self.limit, when)

    def require_finite(self, output: Output) -> None:
        """Raises WrongAnswer unless an output for an input whose answer is not known looks like
        one."""
        if not all(bool(torch.isfinite(one).all()) for one in self._tensors(output, 0)):
            raise check.WrongAnswer("the output for a new input is not finite")

    def _tensors(self, output: Output, batch: int) -> list[Tensor]:
        return check.require_output(output, self.eager[batch])


def answers(
    model: nn.Module,
    batches: Sequence[Tensor],
    math_mode: str,
    compute: Compute | None = None,
) -> Answers:
    """Runs eager and the fp64 reference of the same weights on all batches.

    Args:
        compute: what eager computes in; None for the network's own dtype. Its int8 is simulated
            (fake_quantization.py), as torch has none.

    Raises:
        WrongAnswer: the network answers all batches alike, or with nothing that could be checked.
    """
    with torch.inference_mode():
        plain = _in(compute, model, len(batches[0]))
        eager = [plain(images) for images in batches]
        del plain
        if not check.outputs(eager[0]):
            raise check.WrongAnswer(
                f"the network returns {check.structure(eager[0])}, in which there is no tensor"
            )
        twin = deepcopy(model).double()
        reference = [check.in_chunks(twin, images.double()) for images in batches]
        del twin
        in_fp32 = None
        if compute is not None and compute.calibration is not None:
            in_fp32 = _judged([model(images) for images in batches], reference, "ieee")
    found = _judged(eager, reference, math_mode)
    check.require_telling(reference, found.limit)
    if compute is None:
        return found
    errors = (check.relative_errors(y, ref) for y, ref in zip(eager, reference, strict=True))
    return replace(found, least=max(map(max, errors)) / FINER, in_fp32=in_fp32)


def _in(compute: Compute | None, model: nn.Module, batch_size: int) -> nn.Module:
    """The network as eager computes it in `compute`."""
    if compute is None:
        return model
    if compute.calibration is not None:
        return FakeQuantized(model, compute.calibration, batch_size)
    return in_dtype(deepcopy(model), compute.dtype)


def _judged(eager: Sequence[Output], reference: Sequence[Output], math_mode: str) -> Answers:
    """Answers whose limit is by eager's own errors, in all batches."""
    errors = [check.relative_errors(y, ref) for y, ref in zip(eager, reference, strict=True)]
    first, *further = map(max, zip(*errors, strict=True))
    return Answers(reference, eager, check.Limit.from_eager(first, math_mode, *further))


class Checked:
    """Something that maps a batch to its answer; owns the buffer its inputs are written to.

    The batches take turns in that one buffer, so an output remembered by the input's address is
    wrong the next time; the output of each round is filled with NaN before the next, so a buffer
    that is not written to is found out.
    """

    phases: tuple[str, ...] = ()

    def __init__(
        self,
        build: Callable[[Tensor], Run],
        memory_format: str,
        batches: Sequence[Tensor],
        example: Tensor | None = None,
    ) -> None:
        """Keeps the arguments; nothing runs yet.

        Args:
            build: makes what runs, given an example of its input.
            memory_format: of that input.
            batches: inputs [N, ...]: the timed ones, and one more for afterwards.
            example: what is built with and run on until the first check, of the shape of a batch;
                None for the first batch. What adapts to images must not see the measured ones.
        """
        self._build = build
        self._batches = batches
        first = batches[0] if example is None else example
        self._images = first.clone(memory_format=MEMORY_FORMATS[memory_format])
        self._output: Output | None = None
        self._turn = 0
        self._rolled = 0
        self._answers: Answers | None = None
        self._poisoned: list[bool] = []  # for each output

    def set_up(self) -> None:
        """Everything that happens once; the first run compiles and tunes, so it belongs here."""
        self._run = self._build(self._images)
        del self._build  # and with it the model, where what runs does not need it
        self.step_once()

    def explain(self) -> str:
        """Returns what the backend says of its own plan, as an engine can, or ""."""
        told = getattr(self._run, "explain", None)
        return str(told(self._images.shape[0])) if callable(told) else ""

    def weights_bytes(self) -> int | None:
        """Returns the bytes of the weights as the backend keeps them, None where it does not say,
        as an engine does."""
        told = getattr(self._run, "memory", None)
        if not callable(told):
            return None
        held = told(self._images.shape[0])
        return int(held.weights_bytes + held.originals_bytes)

    def expect(self, answers: Answers) -> None:
        self._answers = answers
        # What is the same for all inputs may be a buffer of the network itself.
        self._poisoned = [not same for same in answers.constant()]

    def step_once(self) -> None:
        self._output = self._run(self._images)

    def check(self, batch: int, when: str) -> Accuracy:
        """Runs one batch through the timed buffer.

        Raises:
            WrongAnswer: the output is not within the limit of the reference.
        """
        assert self._answers is not None
        self._set_out(batch)
        self._output = self._run(self._images)
        return self._answers.accuracy(self._output, batch, when)

    def timed(self) -> Step:
        return Step(self._prepare, self._timed_run, self._verify)

    def unseen(self) -> Step:
        """Returns a step on inputs that never come twice: the last batch, further rolled each
        time."""
        return Step(self._prepare_unseen, self._timed_run, self._verify_unseen)

    def _set_out(self, batch: int, rolled: int = 0) -> None:
        if self._output is not None:
            poison(self._output, self._poisoned)
        images = self._batches[batch]
        self._images.copy_(images.roll(rolled, -1) if rolled else images)

    def _prepare_unseen(self) -> None:
        self._rolled += 1
        self._set_out(len(self._batches) - 1, self._rolled)

    def _verify_unseen(self, snapshot: Output) -> None:
        """Their answers are not known; the last batch's own, not rolled, is checked afterwards."""
        assert self._answers is not None
        self._answers.require_finite(snapshot)

    def _prepare(self) -> None:
        self._turn = (self._turn + int(torch.randint(TIMED_BATCHES + 1, ()))) % TIMED_BATCHES
        self._set_out(self._turn)

    def _timed_run(self, lap: Callable[[], None]) -> Output:
        self._output = self._run(self._images)
        return self._output

    def _verify(self, snapshot: Output) -> None:
        assert self._answers is not None
        self._answers.require(snapshot, self._turn, IN_A_ROUND)


@torch.inference_mode()
def poison(output: Output, which: Sequence[bool]) -> None:
    """Makes these of an output's tensors wrong, so that memory which is not written to again is
    found out."""
    for poisoned, one in zip(which, check.outputs(output), strict=False):
        if poisoned:
            _poison(one)


def _poison(output: Tensor) -> None:
    """Fills it with what no right answer holds: NaN, or the largest number of an integer type."""
    if output.is_floating_point() or output.is_complex():
        output.fill_(float("nan"))
    elif output.dtype == torch.bool:
        output.logical_not_()
    else:
        output.fill_(torch.iinfo(output.dtype).max)


class Inference(Checked):
    """One backend running one network."""

    def __init__(
        self,
        backend: str,
        memory_format: str,
        model: nn.Module,
        batches: Sequence[Tensor],
        compute: Compute | None = None,
    ) -> None:
        build = partial(load_build(backend, compute), in_format(model, memory_format))
        example = None if compute is None else compute.example(batches[0])
        super().__init__(build, memory_format, batches, example)
