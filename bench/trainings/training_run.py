"""Which network is trained, on what, for how long, run how: plain data, as a case is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING

from resfuse.bench.common.errors import UsageError
from resfuse.bench.trainings.data import CIFAR, DIGITS
from resfuse.bench.trainings.variants import EAGER

if TYPE_CHECKING:
    from resfuse.resnet_ref.resnet import ResNet

SHORTCUTS = ("A", "B", "C")
PLAIN = "none"  # what a plain network has for a shortcut


@dataclass(frozen=True)
class Protocol:
    """What a kind of data asks for; the rest of the recipe is the paper's."""

    epochs: int
    batch_size: int
    learning_rate: float


# CIFAR-10: the paper's 64,000 steps. Digits have 12 steps an epoch, 360 in all. At the paper's 0.1
# that is too few for any network of 56 layers to find its way back from the first steps: after 30
# epochs a residual one had a training error of 52 %, and one of 0.1 % at 0.02.
PROTOCOLS = {DIGITS: Protocol(30, 128, 0.02), CIFAR: Protocol(164, 128, 0.1)}


@dataclass(frozen=True)
class Run:
    """One training."""

    data: str  # a key of PROTOCOLS
    shortcut: str  # one of SHORTCUTS, or PLAIN
    depth: int  # layers with weights, projections not counted
    seed: int  # of the weights, the order of the images and their crops
    epochs: int
    batch_size: int  # images
    learning_rate: float  # before it is divided
    way: str = EAGER  # a key of WAYS

    @property
    def model(self) -> str:
        """Returns the network as MODELS would name it."""
        if self.shortcut == PLAIN:
            return f"cifar_plain{self.depth}"
        return f"cifar_resnet{self.depth}" + (
            "" if self.shortcut == "A" else f"_{self.shortcut.lower()}"
        )

    def identity(self) -> dict[str, str | int | float]:
        """Returns the columns that identify the run; equal ones train the same in one
        environment."""
        return {"model": self.model, **asdict(self)}


def runs_of(
    data: str,
    depths: Sequence[int],
    shortcuts: Sequence[str],
    seeds: int,
    epochs: int | None,
    ways: Sequence[str] = (EAGER,),
) -> list[Run]:
    """Returns every training asked for, the first seed of everything before the second of anything:
    what is there after an hour says most.

    Args:
        data: a key of PROTOCOLS.
        depths: 6n + 2 each.
        shortcuts: of SHORTCUTS, or PLAIN.
        seeds: how many.
        epochs: None for the protocol's.
        ways: keys of WAYS.

    Raises:
        UsageError: a depth no network has.
    """
    from resfuse.resnet_ref.cifar import blocks_per_stage

    wanted = sorted(set(depths))
    for depth in wanted:
        try:
            blocks_per_stage(depth, 2)
        except ValueError as error:
            raise UsageError(f"argument --depths: {error}") from None
    protocol = PROTOCOLS[data]
    return [
        Run(data, shortcut, depth, seed, epochs or protocol.epochs, protocol.batch_size,
            protocol.learning_rate, way)
        for seed, depth, shortcut, way in product(range(seeds), wanted, shortcuts, ways)
    ]  # fmt: skip


def build(run: Run) -> "ResNet":
    """Returns the network with the weights of its seed, drawn as the paper does (He et al. 2015,
    arXiv:1502.01852).

    Reseeds torch's own generator, from which they are drawn: one training a process.
    """
    import torch

    from resfuse.resnet_ref.cifar import cifar_plain, cifar_resnet

    torch.manual_seed(run.seed)
    if run.shortcut == PLAIN:
        return cifar_plain(run.depth)
    return cifar_resnet(run.depth, run.shortcut)  # type: ignore[arg-type]
