"""Trains one network by the recipe of He et al. 2015 (arXiv:1512.03385), section 4.2.

SGD with momentum 0.9 and weight decay 1e-4 on all parameters, batch norm, no dropout; the learning
rate is divided by ten after half and after three quarters of the epochs, as the paper does after
32,000 and 48,000 of 64,000 steps. Networks of 110 layers and more start at a tenth of the rate, as
the paper's ResNet-110 does, until their training error is below 80 %, but for a tenth of the epochs
at most: plain ones might never come that far, and would fail for the rate alone. Images are shifted
and mirrored as data.Data says, and have the training images' mean subtracted, pixel by pixel.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.bench.trainings.data import Data, Split
from resfuse.bench.trainings.training_run import Run, build
from resfuse.bench.trainings.variants import WAYS, run_as

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
WARM_UP_FROM, WARM_UP_UNTIL, WARM_UP_SHARE = 110, 0.8, 0.1  # layers, error, share of epochs
AT_ONCE = 500  # images when nothing is learnt
FIRST_STEPS = 100  # whose losses are kept one by one: two ways of training part there
Tell = Callable[[float], None]  # share of the training that is done, 0 to 1
Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """The result of a training; errors are shares of images, 0 to 1, losses mean cross-entropies in
    nats.

    `train_curve` is the error while training, on shifted images with the weights of the moment, as
    in the paper's plots; `train_error` that of the finished network on the images as they are.
    `train_losses` and `train_loss` likewise.
    """

    param_count: int
    train_error: float
    train_loss: float
    test_error: float
    test_loss: float
    train_curve: tuple[float, ...]  # an epoch each
    test_curve: tuple[float, ...]
    train_losses: tuple[float, ...]
    test_losses: tuple[float, ...]
    first_losses: tuple[float, ...]  # of each of the first steps, FIRST_STEPS at most
    gradient_norms: tuple[float, ...]  # of the loss by each layer's weight before the first step


def train(run: Run, data: Data, device: str, tell: Tell = lambda share: None) -> Trained:
    """Returns the result of `train_network` without the network."""
    return train_network(run, data, device, tell)[1]


def train_network(
    run: Run, data: Data, device: str, tell: Tell = lambda share: None
) -> tuple[nn.Module, Trained]:
    """Trains a network and returns it, in training mode, with the result; on one CPU thread the
    same run gives the same bits.

    Args:
        run: which, and for how long.
        data: of that kind.
        device: cpu, cuda, cuda:N.
        tell: called some times an epoch.
    """
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    model = build(run).to(device).to(memory_format=torch.channels_last)
    with run_as(run.way, model):
        return model, _train(run, model, data, device, tell)


def _train(run: Run, model: nn.Module, data: Data, device: str, tell: Tell) -> Trained:
    prepare = preparation(data, device, getattr(torch, WAYS[run.way].dtype))
    optimizer = torch.optim.SGD(
        model.parameters(), run.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    generator = torch.Generator().manual_seed(run.seed)
    first = Split(data.train.images[: run.batch_size], data.train.labels[: run.batch_size])
    norms = gradient_norms(model, prepare(first.images), first.labels.to(device))
    train_curve: list[float] = []
    tested: list[tuple[float, float]] = []  # error and loss
    losses: list[Tensor] = []  # of an epoch's steps
    train_losses: list[float] = []
    first_losses: list[float] = []
    warming = run.depth >= WARM_UP_FROM
    for epoch in range(run.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, epoch, warming)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        losses.clear()
        steps = -(-len(data.train.labels) // run.batch_size)
        for i, (images, labels) in enumerate(_batches(data, run.batch_size, generator)):
            answers, labels = model(prepare(images)), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(answers, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            wrong += (answers.detach().argmax(1) != labels).sum()
            if i % 4 == 0:
                tell((epoch + i / steps) / run.epochs)
        train_curve.append(int(wrong) / len(data.train.labels))
        by_step = torch.stack(losses).tolist()
        train_losses.append(_mean_loss(by_step, run.batch_size, len(data.train.labels)))
        first_losses += by_step[: FIRST_STEPS - len(first_losses)]
        tested.append(evaluate(model, data.test, prepare))
        warming &= train_curve[-1] >= WARM_UP_UNTIL and epoch + 1 < WARM_UP_SHARE * run.epochs
    error, train_loss = evaluate(model, data.train, prepare)
    test_curve, test_losses = zip(*tested, strict=True)
    return Trained(
        sum(p.numel() for p in model.parameters()), error, train_loss, test_curve[-1],
        test_losses[-1], tuple(train_curve), test_curve, tuple(train_losses), test_losses,
        tuple(first_losses), norms,
    )  # fmt: skip


def _mean_loss(by_step: Sequence[float], batch_size: int, images: int) -> float:
    """Returns the mean loss over an epoch's images; the last step may have had fewer."""
    *whole, last = by_step
    return (sum(whole) * batch_size + last * (images - len(whole) * batch_size)) / images


def learning_rate(run: Run, epoch: int, warming: bool) -> float:
    """Returns the rate of an epoch, counted from 0, which may be one of those that warm up."""
    if warming:
        return run.learning_rate / 10
    drops = (2 * epoch >= run.epochs) + (4 * epoch >= 3 * run.epochs)
    return run.learning_rate / float(10**drops)


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Returns the L2 norm of the loss's gradient by each layer's weight, from the first layer to
    the last.

    Convolutions and the fully connected layer; projection shortcuts are no layers. `model` is left
    as it is, batch-norm statistics too.

    Args:
        model: in training mode.
        images: [N, 3, H, W], prepared.
        labels: [N].
    """
    model = deepcopy(model)
    F.cross_entropy(model(images), labels).backward()
    return tuple(
        float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and "downsample" not in name and parameter.grad is not None
    )


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, prepare: Prepare) -> tuple[float, float]:
    """Returns the error (share of images) and mean cross-entropy in eval mode, and restores the
    mode."""
    model.eval()
    pieces = zip(split.images.split(AT_ONCE), split.labels.split(AT_ONCE), strict=True)
    wrong, loss = 0, 0.0
    for images, labels in pieces:
        answers = model(prepare(images))
        labels = labels.to(answers.device)
        wrong += int((answers.argmax(1) != labels).sum())
        loss += float(F.cross_entropy(answers, labels, reduction="sum"))
    model.train()
    return wrong / len(split.labels), loss / len(split.labels)


def preparation(data: Data, device: str, dtype: torch.dtype = torch.float32) -> Prepare:
    """Returns a function from uint8 images [N, 3, H, W] to what a network reads: channels_last, on
    the device, minus the training images' mean pixel by pixel, over their standard deviation. It is
    computed in float32, so that networks of another dtype read the same numbers."""
    mean = data.train.images.double().mean(0)
    deviation = sum(float(part.double().sub(mean).square().sum())
                    for part in data.train.images.split(AT_ONCE))  # fmt: skip
    scale = (data.train.images.numel() / deviation) ** 0.5
    mean = mean.float().to(device)

    def prepare(images: Tensor) -> Tensor:
        moved = images.to(device, torch.float32).sub(mean).mul(scale)
        return moved.to(dtype).contiguous(memory_format=torch.channels_last)

    return prepare


def _batches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields an epoch: every training image once, in random order, each shifted and mirrored at
    random."""
    order = torch.randperm(len(data.train.labels), generator=generator)
    for chosen in order.split(size):
        images = data.train.images[chosen]
        yield shifted(images, data.shift, data.flip, generator), data.train.labels[chosen]


def shifted(images: Tensor, most: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Returns images [N, C, H, W], each shifted by up to `most` pixels either way and filled with
    zeros, and half of them mirrored if `flip`."""
    count, _, height, width = images.shape
    framed = F.pad(images, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1, 1), generator=generator)
    rows = down + torch.arange(height)[:, None]
    columns = right + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
    moved = framed[torch.arange(count)[:, None, None], :, rows, columns]  # [N, H, W, C]
    return moved.permute(0, 3, 1, 2)
