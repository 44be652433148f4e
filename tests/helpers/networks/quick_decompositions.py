"""What torch does anew each time that a program is decomposed, done once: it asks every operator of
its own whether it is composite, and overrides ten kernels of each one that is. Three layers are
captured in a third of the time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._subclasses import fake_impls

Overrides = Mapping[Any, Callable[..., Any]]


def listed_once(listed: Callable[[], set[Any]]) -> Callable[[], set[Any]]:
    """Returns a function that lists the composite operators again only where the dispatcher has
    more of them."""
    found: dict[int, set[Any]] = {}

    def list_operators() -> set[Any]:
        key = "CompositeImplicitAutograd"
        known = len(torch._C._dispatch_get_registrations_for_dispatch_key(key))
        if known not in found:
            found[known] = listed()
        return set(found[known])

    return list_operators


def overridden_once(
    override: Callable[[Overrides], AbstractContextManager[None]],
) -> Callable[[Overrides], AbstractContextManager[None]]:
    """Returns a context manager that overrides kernels as `override` does, by the tables that it
    has made the first time, as long as the operators' own kernels are what they were then."""
    made: dict[frozenset[Any], dict[Any, tuple[dict[Any, Any], dict[Any, Any], Any]]] = {}

    @contextlib.contextmanager
    def overridden(asked: Overrides) -> Iterator[None]:
        key, before = frozenset(asked.items()), {op: op.py_kernels.copy() for op in asked}
        if key not in made or any(before[op] != made[key][op][0] for op in asked):
            with override(asked):
                rules = fake_impls.op_implementations_dict
                made[key] = {op: (before[op], op.py_kernels.copy(), rules.get(op)) for op in asked}
                yield
            return
        for op, (_, kernels, rule) in made[key].items():
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()
            if rule is not None and op not in fake_impls.op_implementations_dict:
                fake_impls.register_op_impl(op)(rule)
        try:
            yield
        finally:
            for op, (own, _, _) in made[key].items():
                op.py_kernels.clear()
                op.py_kernels.update(own)
                op._dispatch_cache.clear()
                fake_impls._deregister_op_impl(op)

    return overridden
