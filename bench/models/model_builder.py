"""A model from its description: its name, a seed, and where its weights are from."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.source import Shape, Source, file_origin, first_line
from resfuse.bench.models.sources import parsed
from resfuse.bench.models.weights_file import load_state, read_state

SEEDED, OWN, PRETRAINED = "seeded", "own", "pretrained"
NO_FILE = (SEEDED, OWN, PRETRAINED)  # anything else is the path of a weights file


def build(model: str, seed: int = 0, weights: str = SEEDED) -> nn.Module:
    """The model in eval mode, on the CPU, as its source makes it; the same in every process.

    Args:
        seed: of torch's generator, which the caller gets back as it was.
        weights: "seeded" or "own" for what the source gives, "pretrained", or a file.

    Raises:
        UsageError: it cannot be built or the weights cannot be used; names the flag and the model.
    """
    source, name, given = parsed(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU, too
        made = _build(source, name, str(given))
    if weights in (SEEDED, OWN):
        return made.eval()
    flag = "--pretrained" if weights == PRETRAINED else "--weights"
    if not source.takes_weights:
        raise UsageError(f"argument {flag}: {model} is measured with its own weights")
    try:
        if weights == PRETRAINED:
            source.load_pretrained(made, name, given.arguments())
        else:
            load_state(made, read_state(weights), weights)
    except UsageError as error:
        raise UsageError(f"argument {flag}: {model}: {error}") from error
    return made.eval()


def input_shape(model: str, asked: Shape | None = None, img_size: int | None = None) -> Shape:
    """The shape of one image: as asked, or what the source says.

    Args:
        img_size: pixels a side instead of the source's.

    Raises:
        UsageError: nothing says it.
    """
    source, name, given = parsed(model)
    if asked is not None and source.weights == OWN:  # a function need not run to say it
        return asked
    try:
        known = source.input_shape(name, given.arguments())
    except UsageError as error:
        raise UsageError(f"argument --model: {error}") from error
    except (TypeError, ValueError) as error:  # of odd arguments
        raise UsageError(f"argument --model-kwargs: {model}: {first_line(error)}") from error
    if asked is not None:
        if known is not None and known[0] != asked[0]:
            raise UsageError(
                f"argument --input-shape: {model} takes {known[0]} channels, not {asked[0]}; "
                "--model-kwargs may say how many"
            )
        return asked
    if known is None:
        raise UsageError(
            f"argument --input-shape: nothing says what images {model} takes; accepted: "
            "--input-shape C,H,W, such as 3,224,224"
        )
    return (known[0], img_size, img_size) if img_size else known


@dataclass(frozen=True)
class Description:
    """A model as the cases of a command have it."""

    name: str
    channels: int
    height: int  # of an image, in pixels
    width: int
    weights: str  # "seeded", "own", "pretrained", or a file
    origin: str
    batch_size: int | None  # the only one it takes

    @property
    def img_width(self) -> int:
        """As a case has it: 0 for square images."""
        return 0 if self.width == self.height else self.width


def describe(
    model: str,
    weights: str = SEEDED,
    asked: Shape | None = None,
    img_size: int | None = None,
) -> Description:
    """All that a case needs to know of a model.

    Args:
        weights: "seeded" stands for those the model comes with, where it has some.

    Raises:
        UsageError: see `input_shape` and `origin`.
    """
    shape = input_shape(model, asked, img_size)
    model = _with_shape(model, shape)
    if weights == SEEDED:
        weights = parsed(model)[0].weights
    file = "" if weights in NO_FILE else weights
    return Description(model, *shape, weights, origin(model, file), batch_size(model))


def batch_size(model: str) -> int | None:
    """The only batch size a model takes; None for any."""
    source, name, given = parsed(model)
    try:
        return source.batch_size(name, given.arguments())
    except UsageError as error:
        raise UsageError(f"argument --model: {error}") from error


def origin(model: str, weights_file: str = "") -> str:
    """Where a model comes from: a package and its version, or a file and the hash of it; with a
    weights file, that and its hash, too."""
    source, name, _ = parsed(model)
    try:
        told = source.origin(name)
        if weights_file and Path(weights_file).is_file():  # whoever reads it says what is wrong
            told += f" + {file_origin(Path(weights_file))}"
    except (UsageError, OSError) as error:
        raise UsageError(f"argument --model: {error}") from error
    return told


def _with_shape(model: str, shape: Shape) -> str:
    """The model's name with what its source builds it with for images of that shape."""
    source, name, given = parsed(model)
    try:
        more = source.arguments_of(name, shape)
    except UsageError as error:
        raise UsageError(f"argument --input-shape: {error}") from error
    kwargs = dict(given.kwargs) | {key: str(value) for key, value in more.items()}
    return str(replace(given, kwargs=tuple(kwargs.items())))


def _build(source: Source, name: str, model: str) -> nn.Module:
    given = parsed(model)[2].arguments()
    try:
        return source.build(name, given)
    except UsageError as error:
        raise UsageError(f"argument --model: {error}") from error
    except Exception as error:  # a constructor may raise anything
        flag = "--model-kwargs" if given else "--model"
        raise UsageError(f"argument {flag}: {model}: {first_line(error)}") from error
