"""A model from its description: its name, a seed, and where its weights are from."""

import torch
from torch import nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.source import Shape, Source, first_line
from resfuse.bench.models.sources import parsed
from resfuse.bench.models.weights_file import load_state, read_state

SEEDED, OWN, PRETRAINED = "seeded", "own", "pretrained"  # or a file


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
    try:
        if weights == PRETRAINED:
            source.load_pretrained(made, name, given.values())
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
    if asked is not None:
        return asked
    source, name, given = parsed(model)
    try:
        known = source.input_shape(name, given.values())
    except UsageError as error:
        raise UsageError(f"argument --model: {error}") from error
    except (TypeError, ValueError) as error:  # of odd arguments
        raise UsageError(f"argument --model-kwargs: {model}: {first_line(error)}") from error
    if known is None:
        raise UsageError(
            f"argument --input-shape: nothing says what images {model} takes; accepted: "
            "--input-shape C,H,W, such as 3,224,224"
        )
    return (known[0], img_size, img_size) if img_size else known


def default_weights(model: str) -> str:
    """What a model has where no weights are asked for: "seeded", or "own"."""
    return parsed(model)[0].weights


def batch_size(model: str) -> int | None:
    """The only batch size a model takes; None for any."""
    source, name, _ = parsed(model)
    return source.batch_size(name)


def origin(model: str) -> str:
    """Where a model comes from: a package and its version, or a file and the hash of it."""
    source, name, given = parsed(model)
    try:
        return source.origin(name)
    except (UsageError, OSError) as error:
        raise UsageError(f"argument --model: {error}") from error


def _build(source: Source, name: str, model: str) -> nn.Module:
    given = parsed(model)[2].values()
    try:
        return source.build(name, given)
    except UsageError as error:
        raise UsageError(f"argument --model: {error}") from error
    except Exception as error:  # a constructor may raise anything
        flag = "--model-kwargs" if given else "--model"
        raise UsageError(f"argument {flag}: {model}: {first_line(error)}") from error


