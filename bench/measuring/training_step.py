"""A network in training: forward, backward, optimizer on the clock; gradients and loss checked."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.bench.backends import load_trainable
from resfuse.bench.measuring import correctness as check
from resfuse.bench.measuring.clock.timing import Step
from resfuse.bench.measuring.network import MEMORY_FORMATS, TIMED_BATCHES, in_format
from resfuse.bench.records.case import PRECISIONS, Case
from resfuse.bench.records.sample import Accuracy

LEARNING_RATE, MOMENTUM = (
    1e-3,
    0.9,
)  # small: some hundred steps on a few images must not blow a network up
# Rounding that carries an activation over ReLU's kink changes gradients in jumps: two ways of
# running fp32 ResNet-18 (batch 4) were off by 0.9e-5 and 3.4e-5. tf32 or fp16 is off by far more.
KINK = 5e-5
# torch's first scale, 65536, overflows in the first steps of some networks, and a skipped step
# would be timed as if it were one; with this one no gradient came near either end of fp16.
FP16_SCALE = 1024.0
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one batch, every parameter's in a row [1, parameters], and the loss."""

    row: Tensor
    loss: float


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
        case: Case,
    ) -> None:
        self._model = in_format(model, memory_format).train()
        for module in self._model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        self._structure = deepcopy(self._model).to("meta")
        self._batches, self._math_mode = batches, case.math_mode
        self._images = batches[0].clone(memory_format=MEMORY_FORMATS[memory_format])
        self._labels = torch.arange(len(self._images), device=self._images.device) % 10
        self._turn = 0
        self._make = load_trainable(backend)
        product = PRECISIONS[case.precision].autocast
        self._autocast = None if product is None else getattr(torch, product)
        device = self._images.device.type
        self._scaler = torch.amp.GradScaler(device, FP16_SCALE, enabled=product == "float16")

    def set_up(self) -> None:
        """Does everything that happens once, the first step included, which compiles and tunes."""
        self._module = self.make_module()
        self._optimizer = torch.optim.SGD(self._model.parameters(), LEARNING_RATE, MOMENTUM)
        self.step_once()

    def make_module(self) -> Run:
        return self._make(self._model, self._images)

    def plain_copy(self) -> nn.Module:
        """Returns the module as it was before any backend changed it, with the present weights."""
        copy = deepcopy(self._structure).to_empty(device=self._images.device)
        state = {name: whole(tensor) for name, tensor in self._model.state_dict().items()}
        copy.load_state_dict(state)
        return copy

    def mean(self, found: Gradients) -> Gradients:
        """Returns the mean of the processes' gradients, as an optimizer sees it."""
        return found

    def first_weight(self) -> Tensor:
        return next(self._model.parameters()).detach()

    def state_bytes(self) -> int:
        """Returns the bytes of parameters, as many gradients, and the optimizer's state."""
        values = [t for s in self._optimizer.state.values() for t in s.values()]
        state = list(filter(torch.is_tensor, values))
        parameters = list(self._model.parameters())
        return sum(local(t).nbytes for t in (*parameters, *parameters, *state))

    def step_once(self) -> None:
        self._timed_run(lambda: None)

    def check(self, batch: int, when: str) -> Accuracy:
        """Compares gradients and loss under the present weights with an fp64 twin's; eager in this
        precision is the yardstick.

        Raises:
            WrongAnswer: the gradients (all parameters, as one vector) or the loss are further off
                than allowed.
        """
        self._images.copy_(self._batches[batch])
        twin = self.plain_copy().double()
        reference = self.mean(gradients(twin, self._images.double(), self._labels))
        yardsticks = [self._eager_gradients(name) for name in MEMORY_FORMATS]
        found = self._gradients(self._model, self._images, through=self._module)
        eager_error = max(check.relative_error(one.row, reference.row) for one in yardsticks)
        limit = check.Limit.from_eager(eager_error + KINK, self._math_mode)
        accuracy = Accuracy(
            rel_l2=check.relative_error(found.row, reference.row),
            max_abs=float((found.row.double() - reference.row).abs().max()),
            err_vs_eager=check.relative_error(found.row, yardsticks[0].row),
            top1_agree=None,
        )
        check.require_right(accuracy.rel_l2, limit, f"of the gradients {when}", accuracy)
        # One number can be right by chance, so that eager's own error in it says little: the limit
        # of the gradients serves, of a loss of 1 where it is smaller.
        loss_error = abs(found.loss - reference.loss) / max(reference.loss, 1.0)
        check.require_right(loss_error, limit, f"of the loss {when}", accuracy)
        return accuracy

    def _gradients(self, model: nn.Module, images: Tensor, through: Run | None = None) -> Gradients:
        found = gradients(
            model, images, self._labels, through, self._cast, self._scaler.get_scale()
        )
        return found if through is not None else self.mean(found)

    def _eager_gradients(self, memory_format: str) -> Gradients:
        images = self._images.contiguous(memory_format=MEMORY_FORMATS[memory_format])
        return self._gradients(in_format(self.plain_copy(), memory_format), images)

    def _cast(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._images.device.type, self._autocast)

    def timed(self) -> Step:
        return Step(self._prepare, self._timed_run, self._verify)

    def _prepare(self) -> None:
        self._turn = (self._turn + int(torch.randint(TIMED_BATCHES + 1, ()))) % TIMED_BATCHES
        self._images.copy_(self._batches[self._turn])
        self._before = self.first_weight().clone()

    def _timed_run(self, lap: Callable[[], None]) -> Tensor:
        with self._cast():
            loss = F.cross_entropy(self._module(self._images), self._labels)
        lap()
        self._scaler.scale(loss).backward()
        lap()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return loss

    def _verify(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise check.WrongAnswer(f"the training loss became {float(loss)} in a timed round")
        weight = self.first_weight()
        if weight.dtype == torch.float32 and torch.equal(self._before, weight):
            raise check.WrongAnswer(
                "a timed training step left the first layer's weights as they were"
            )


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor that is spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    through: Run | None = None,
    cast: Callable[[], AbstractContextManager[object]] = nullcontext,
    scale: float = 1.0,
) -> Gradients:
    """Returns all parameters' gradients of one batch and its loss, and clears the gradients.

    Args:
        through: what runs the model forward, if not the model itself.
        cast: what the forward pass runs under (autocast).
        scale: of the loss on its way back, against fp16's underflow; not of what is returned.
    """
    model.zero_grad()
    with cast():
        logits = model(images) if through is None else through(images)
        loss = F.cross_entropy(logits, labels)
    (scale * loss).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    row = torch.cat([whole(grad).flatten() for grad in found]).detach() / scale
    model.zero_grad()
    return Gradients(row[None], float(loss.detach()))


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that is spread over several processes, all of which must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
