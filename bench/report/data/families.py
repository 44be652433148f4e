"""Families of networks that differ in depth only, read off their names.

The first number in a name is its depth: `resnet18` to `resnet152` are a family, so are
`resnet18_v1` to `resnet152_v1` and `cifar_plain20` to `cifar_plain110`. A new network joins its
family by its name.
"""

import re

_DEPTH = re.compile(r"\d+")


def family(model: str) -> str:
    """Returns the name with `*` for its depth: `resnet*_v1`."""
    return _DEPTH.sub("*", model, count=1)


def depth(model: str) -> int:
    """Returns the depth in a name, 0 where there is none."""
    found = _DEPTH.search(model)
    return int(found.group()) if found else 0
