"""Configurations of kernels that gave a wrong answer on this device: nothing chooses them.

`resfuse check` finds them and keeps them with the engine's measured times, for this device and
software; a kernel's `choose` is told of them, and the engine leaves them out.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

Config = TypeVar("Config")
Key = tuple[str, str]
Barred = frozenset[Key]
NONE: Barred = frozenset()
_PART = "kernel "  # what tells them from parts of graphs, which begin with an operation


def key_of(kernel: str, math_mode: str, config: Any) -> Key:
    """What stands for a configuration, whatever the problem.

    Args:
        kernel: a name in KERNELS.
        config: a dataclass.
    """
    return f"{_PART}{kernel} {math_mode}", json.dumps(asdict(config), sort_keys=True)


def is_configuration(key: Key) -> bool:
    """Whether it is a key made here."""
    return key[0].startswith(_PART)


def allowed(kernel: str, math_mode: str, configs: Iterable[Config], barred: Barred) -> list[Config]:
    """Those of `configs` that may run, in their order.

    Raises:
        ValueError: there are some, and all of them are barred.
    """
    given = list(configs)
    if not barred:
        return given
    left = [config for config in given if key_of(kernel, math_mode, config) not in barred]
    if given and not left:
        raise ValueError(
            f"argument barred: all {len(given)} configurations of {kernel} for the problem in "
            f"{math_mode}; accepted: one that `resfuse check` found right on this device"
        )
    return left
