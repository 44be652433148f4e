"""A network in training: forward, backward and optimizer on the clock, gradients checked."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.bench import check
from resfuse.bench.backends import load_trainable
from resfuse.bench.measured import Accuracy
from resfuse.bench.network import MEMORY_FORMATS, TIMED_BATCHES, in_format
from resfuse.bench.timing import Step

LEARNING_RATE, MOMENTUM = (
    1e-3,
    0.9,
)  # small: some hundred steps on a few images must not blow a network up
# Rounding that carries an activation over ReLU's kink changes gradients in jumps: two ways of
# running fp32 ResNet-18 (batch 4) were off by 0.9e-5 and 3.4e-5. tf32 or fp16 is off by far more.
KINK = 5e-5
Run = Callable[[Tensor], Tensor]


class Training:
    """One backend training one network by SGD with momentum on photographs with fixed labels.

    Dropout is off: its random mask has no reference to be compared with.
    """

    phases = ("forward", "backward", "optimizer")

    def __init__(
        self,
        backend: str,
        memory_format: str,
        model: nn.Module,
        batches: Sequence[Tensor],
        math_mode: str,
    ) -> None:
        self._model = in_format(model, memory_format).train()
        for module in self._model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        self._batches, self._math_mode = batches, math_mode
        self._images = batches[0].clone(memory_format=MEMORY_FORMATS[memory_format])
        self._labels = torch.arange(len(self._images), device=self._images.device) % 10
        self._turn = 0
        self._make = load_trainable(backend)
        self._optimizer = torch.optim.SGD(self._model.parameters(), LEARNING_RATE, MOMENTUM)
        self._watched = next(self._model.parameters())

    def set_up(self) -> None:
        """Everything that happens once; the first step compiles and tunes, so it belongs here."""
        self._module = self._make(self._model, self._images)
        self.step_once()

    def step_once(self) -> None:
        self._timed_run(lambda: None)

    def check(self, batch: int, when: str) -> Accuracy:
        """Compares the gradients of the present weights with an fp64 twin's; eager in this
        precision is the yardstick.

        Raises:
            WrongAnswer: the gradients (all parameters, as one vector) are further off than allowed.
        """
        self._images.copy_(self._batches[batch])
        reference = _gradients(deepcopy(self._model).double(), self._images.double(), self._labels)
        yardsticks = [self._eager_gradients(name) for name in MEMORY_FORMATS]
        found = _gradients(self._model, self._images, self._labels, through=self._module)
        eager_error = max(check.relative_error(one, reference) for one in yardsticks)
        limit = check.Limit.from_eager(eager_error + KINK, self._math_mode)
        accuracy = Accuracy(
            rel_l2=check.relative_error(found, reference),
            max_abs=float((found.double() - reference).abs().max()),
            err_vs_eager=check.relative_error(found, yardsticks[0]),
            top1_agree=None,
        )
        check.require_right(accuracy.rel_l2, limit, f"of the gradients {when}", accuracy)
        return accuracy

    def _eager_gradients(self, memory_format: str) -> Tensor:
        twin = in_format(deepcopy(self._model), memory_format)
        images = self._images.contiguous(memory_format=MEMORY_FORMATS[memory_format])
        return _gradients(twin, images, self._labels)

    def timed(self) -> Step:
        return Step(self._prepare, self._timed_run, self._verify)

    def _prepare(self) -> None:
        self._turn = (self._turn + int(torch.randint(TIMED_BATCHES + 1, ()))) % TIMED_BATCHES
        self._images.copy_(self._batches[self._turn])
        self._before = self._watched.detach().clone()

    def _timed_run(self, lap: Callable[[], None]) -> Tensor:
        loss = F.cross_entropy(self._module(self._images), self._labels)
        lap()
        loss.backward()
        lap()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _verify(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise check.WrongAnswer(f"the training loss became {float(loss)} in a timed round")
        if self._watched.dtype == torch.float32 and torch.equal(self._before, self._watched):
            raise check.WrongAnswer(
                "a timed training step left the first layer's weights as they were"
            )


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, through: Run | None = None
) -> Tensor:
    """All parameters' gradients of one batch as a row [1, parameters]; leaves none behind.

    Args:
        through: what runs the model forward, if not the model itself.
    """
    model.zero_grad()
    logits = model(images) if through is None else through(images)
    F.cross_entropy(logits, labels).backward()
    row = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).detach()
    model.zero_grad()
    return row[None]
