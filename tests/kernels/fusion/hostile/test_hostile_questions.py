"""Forwards that ask what they were given take the branch they take without us."""

import collections.abc
import sys
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hostile import images, is_fused, pair_of, require_alike
from resfuse.kernels import explain

ELSEWHERE = types.ModuleType("asked_elsewhere")
exec(
    """
import torch
def first(x):
    return x if isinstance(x, torch.Tensor) else x[0]
def as_image(x):
    return x[0] if isinstance(x, (list, tuple)) else x
""",
    vars(ELSEWHERE),
)
sys.modules["asked_elsewhere"] = ELSEWHERE


class Pair(NamedTuple):
    image: Tensor
    mask: Tensor


class Nested:
    def __init__(self, tensors: Tensor) -> None:
        self.tensors = tensors


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.tokens = Tokens()

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Tokens(nn.Module):
    """Returns something other than a tensor."""

    def forward(self, x: Tensor) -> Any:
        return {"out": x * 2, "aux": x}


def _is_tensor(m: Any, x: Any) -> Any:
    return m.body(x if torch.is_tensor(x) else x[0])


def _isinstance(m: Any, x: Any) -> Any:
    return m.body(x if isinstance(x, Tensor) else x[0])


def _isinstance_tuple(m: Any, x: Any) -> Any:
    return m.body(torch.cat(list(x), 1)[:, :8] if isinstance(x, tuple) else x)


def _isinstance_list(m: Any, x: Any) -> Any:
    return m.body(torch.cat(x, 1)[:, :8] if isinstance(x, list) else x)


def _isinstance_dict(m: Any, x: Any) -> Any:
    return m.body(x["image"] if isinstance(x, dict) else x)


def _mapping(m: Any, x: Any) -> Any:
    return m.body(x["image"] if isinstance(x, collections.abc.Mapping) else x)


def _type_is(m: Any, x: Any) -> Any:
    return m.body(x if type(x) is Tensor else x[0])


def _type_in(m: Any, x: Any) -> Any:
    return m.body(x[0] if type(x) in (list, tuple) else x)


def _class_is(m: Any, x: Any) -> Any:
    return m.body(x if x.__class__ is Tensor else x[0])


def _issubclass(m: Any, x: Any) -> Any:
    return m.body(x if issubclass(type(x), Tensor) else x[0])


def _hasattr(m: Any, x: Any) -> Any:
    return m.body(x.tensors if hasattr(x, "tensors") else x)


def _getattr(m: Any, x: Any) -> Any:
    return m.body(getattr(x, "image", x))


def _hasattr_shape(m: Any, x: Any) -> Any:
    return m.body(x if hasattr(x, "shape") else x[0])


def _callable(m: Any, x: Any) -> Any:
    return m.body(x() if callable(x) else x)


def _try(m: Any, x: Any) -> Any:
    try:
        x = x["image"]
    except (TypeError, IndexError, KeyError):
        x = x * 1
    return m.body(x)


def _try_bare(m: Any, x: Any) -> Any:
    try:
        x = x.tensors
    except:  # noqa: E722
        x = x * 1
    return m.body(x)


def _match(m: Any, x: Any) -> Any:
    match x:
        case [first, *_]:
            x = first
        case {"image": image}:
            x = image
    return m.body(x)


def _length(m: Any, x: Any) -> Any:
    return m.body(x if len(x) > 1 else torch.cat([x, x]))


def _iterate(m: Any, x: Any) -> Any:
    return torch.stack([m.body(one[None])[0] for one in x])


def _dim(m: Any, x: Any) -> Any:
    return m.body(x.unsqueeze(0) if x.dim() == 3 else x)


def _odd(m: Any, x: Any) -> Any:
    return m.body(nn.functional.pad(x, (0, 1)) if x.shape[-1] % 2 else x)


def _floating(m: Any, x: Any) -> Any:
    return m.body(x if torch.is_floating_point(x) else x / 255)


def _shape_is_tuple(m: Any, x: Any) -> Any:
    return m.body(x) * (2 if isinstance(x.shape, tuple) else 3)


def _child_is_tensor(m: Any, x: Any) -> Any:
    y = m.tokens(m.body(x))
    return y if isinstance(y, Tensor) else y["out"]


def _child_has(m: Any, x: Any) -> Any:
    y = m.tokens(m.body(x))
    return y.out if hasattr(y, "out") else y["out"]


def _child_is_dict(m: Any, x: Any) -> Any:
    y = m.tokens(m.body(x))
    return y["out"] if isinstance(y, dict) else y


def _elsewhere(m: Any, x: Any) -> Any:
    return m.body(ELSEWHERE.first(x))


def _elsewhere_list(m: Any, x: Any) -> Any:
    return m.body(sys.modules["asked_elsewhere"].as_image(x))


def _grad(m: Any, x: Any) -> Any:
    return m.body(x) * (2 if torch.is_grad_enabled() else 1)


def _autocast_asked(m: Any, x: Any) -> Any:
    return m.body(x) * (2 if torch.is_autocast_enabled("cpu") else 1)


def _autocast_set(m: Any, x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return m.body(x).float()


def _in_float32(m: Any, x: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return m.body(x.float())


def _default_dtype(m: Any, x: Any) -> Any:
    return m.body(x) * (1 if torch.get_default_dtype() is torch.float32 else 2)


def _is_none(m: Any, x: Any) -> Any:
    return m.body(x) if x is not None else None


def _equals(m: Any, x: Any) -> Any:
    return x if x in (None, []) else m.body(x)


def _subscripted(m: Any, x: Any) -> Any:
    return m.body(x[0])


def _training_asked(m: Any, x: Any) -> Any:
    return m.body(x) * (2 if m.training else 1)


def _norm_training(m: Any, x: Any) -> Any:
    return m.body(x) * (2 if m.bn.training else 1)


def _class_name(m: Any, x: Any) -> Any:
    return m.body(x) * (2 if m.__class__.__name__ == "_class_name" else 3)


def _type_of_child(m: Any, x: Any) -> Any:
    return m.body(x) * (2 if type(m.relu) is nn.ReLU else 3)


FORWARDS = [value for name, value in list(globals().items()) if name.startswith("_") and
            isinstance(value, types.FunctionType)]  # fmt: skip

INPUTS: dict[str, Any] = {
    "a tensor": images(),
    "one image": images(shape=(8, 6, 7)),
    "one tensor of one": images(shape=(1, 8, 5, 5)),
    "a list": [images(1), images(2)],
    "a tuple": (images(1), images(2)),
    "a dict": {"image": images()},
    "an ordered dict": OrderedDict(image=images()),
    "a named tuple": Pair(images(), images(2)),
    "bytes": (images() * 10).to(torch.uint8),
    "a parameter": nn.Parameter(images(), False),
    "an array": np.zeros((2, 8, 6, 7), np.float32),
    "nothing": None,
    "five dimensions": images(shape=(2, 2, 8, 6, 7)),
}


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_every_kind_of_input_takes_its_branch(forward: Any) -> None:
    plain, fused = pair_of(lambda: type(forward.__name__, (Layers,), {"forward": forward})())
    for name, x in INPUTS.items():
        try:
            require_alike(plain, fused, x)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    for x in (Nested(images()), images):
        require_alike(plain, fused, x)


@pytest.mark.parametrize(
    "forward",
    [_is_tensor, _isinstance, _isinstance_tuple, _isinstance_dict, _mapping, _hasattr, _getattr,
     _elsewhere, _elsewhere_list, _is_none, _training_asked, _hasattr_shape],
)  # fmt: skip
def test_questions_that_can_be_answered_cost_nothing(forward: Any) -> None:
    assert is_fused(pair_of(lambda: type("Asks", (Layers,), {"forward": forward})())[1])


@pytest.mark.parametrize(
    "forward, reason",
    [
        (_type_is, "asks type()"),
        (_callable, "asks callable()"),
        (_try, "catches exceptions"),
        (_try_bare, "catches exceptions"),
        (_child_is_tensor, "asks for the type of what a module"),
        (_grad, "asks torch for is_grad_enabled()"),
        (_autocast_set, "changes autocast"),
        (_class_name, "reads self.__class__"),
    ],
)
def test_the_reason_is_said(forward: Any, reason: str) -> None:
    model = pair_of(lambda: type("Asks", (Layers,), {"forward": forward})())[1]
    assert reason in explain(model).lines[0].how


def test_a_subclass_of_tensor_keeps_its_type() -> None:
    class Tracked(Tensor):
        pass

    plain, fused = pair_of(lambda: type("Plain", (Layers,), {"forward": Layers.body})())
    with torch.no_grad():
        x = images().as_subclass(Tracked)
        assert type(fused(x)) is type(plain(x)) is Tracked


def test_a_context_that_changes_nothing_while_it_is_traced() -> None:
    """It does when the model is called within autocast."""
    plain, fused = pair_of(lambda: type("Asks", (Layers,), {"forward": _in_float32})())
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            want, got = plain(images()), fused(images())
        assert (got.dtype, got.requires_grad) == (want.dtype, want.requires_grad)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
