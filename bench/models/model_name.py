"""A model's name as users write it: a source, a name there, and keyword arguments.

`SOURCE:NAME?key=value&key=value`; what follows the question mark is what `--model-kwargs` says. No
torch in this file.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resfuse.bench.common.errors import UsageError

Kwargs = tuple[tuple[str, str], ...]  # values as they were written


@dataclass(frozen=True)
class ModelName:
    text: str  # without the arguments: "timm:resnet50d", "./net.py:build", "model.pt2"
    kwargs: Kwargs = ()

    def __str__(self) -> str:
        given = "&".join(f"{key}={value}" for key, value in self.kwargs)
        return f"{self.text}?{given}" if given else self.text

    def arguments(self) -> dict[str, Any]:
        """The arguments as Python values: literals where they are such, text otherwise, as timm
        reads its `--model-kwargs`."""
        return {key: _literal(value) for key, value in self.kwargs}


def parse(text: str, argument: str = "--model", more: Sequence[str] = ()) -> ModelName:
    """Takes a name apart; a question mark that no `=` follows is a wildcard.

    Args:
        more: further arguments, each `key=value`; they win over those of the name.

    Raises:
        UsageError: an argument is not `key=value`.
    """
    name, _, given = text.partition("?")
    if "=" not in given:
        name, given = text, ""
    own = dict(_pair(pair, argument) for pair in given.split("&") if pair)
    own |= dict(_pair(pair, "--model-kwargs") for pair in more)
    return ModelName(name, tuple(own.items()))


def _pair(text: str, argument: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier() or not value:
        raise UsageError(f"argument {argument}: '{text}' is not NAME=VALUE, such as num_classes=10")
    return key, value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
