"""What models are called with, and how."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as all_modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from habits import CHANNELS


class Tagged(Tensor):
    """A user's subclass of Tensor."""


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def spoilt(value: float) -> Tensor:
    x = randn(2, CHANNELS, 5, 6)
    x[0, 1, 2, 3] = value
    return x


IMAGE = (2, CHANNELS, 5, 6)
INPUTS: dict[str, Callable[[], Any]] = {
    "image": lambda: randn(*IMAGE),
    "small": lambda: randn(1, CHANNELS, 4, 4),
    "more": lambda: randn(3, CHANNELS, 7, 3),
    "one pixel": lambda: randn(2, CHANNELS, 1, 1),
    "empty": lambda: randn(0, CHANNELS, 5, 6),
    "channels last": lambda: randn(*IMAGE).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: randn(2, CHANNELS, 6, 5).mT,
    "batch last": lambda: randn(CHANNELS, 5, 6, 2).permute(3, 0, 1, 2),
    "sliced": lambda: randn(2, 2 * CHANNELS, 5, 12)[:, ::2, :, ::2],
    "offset": lambda: randn(1 + 2 * CHANNELS * 30)[1:].view(IMAGE),
    "expanded batch": lambda: randn(1, CHANNELS, 5, 6).expand(IMAGE),
    "expanded channels": lambda: randn(2, 1, 5, 6).expand(IMAGE),
    "no batch": lambda: randn(CHANNELS, 5, 6),
    "wrong channels": lambda: randn(2, 3, 5, 6),
    "subclass": lambda: randn(*IMAGE).as_subclass(Tagged),
    "parameter": lambda: nn.Parameter(randn(*IMAGE)),
    "wants gradients": lambda: randn(*IMAGE).requires_grad_(),
    "of inference mode": lambda: torch.inference_mode()(lambda: randn(*IMAGE))(),
    "lazily negated": lambda: torch.complex(randn(*IMAGE), randn(*IMAGE)).conj().imag,
    "nan": lambda: spoilt(float("nan")),
    "inf": lambda: spoilt(float("inf")),
    "sparse": lambda: randn(*IMAGE).to_sparse(),
    "whole numbers": lambda: randn(*IMAGE).mul(3).long(),
    "dict": lambda: {"image": randn(*IMAGE)},
    "list": lambda: [randn(*IMAGE)],
    "none": lambda: None,
    "numpy": lambda: randn(*IMAGE).numpy(),
}
OTHER_DTYPES = ("double", "half", "bfloat16")
INPUTS.update({name: lambda name=name: getattr(randn(*IMAGE), name)() for name in OTHER_DTYPES})


def input_of(name: str, model: nn.Module) -> Any:
    """The input of that name, in the dtype of the model's first parameter but where it is named
    after one."""
    x, first = INPUTS[name](), next(model.parameters(), None)
    fits = isinstance(x, Tensor) and x.dtype == torch.float32 and name not in OTHER_DTYPES
    if not fits or first is None or first.dtype == torch.float32:
        return x
    with torch.no_grad():
        return x.to(first.dtype)


# How it is called


class Functions(TorchFunctionMode):
    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return f(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(f))
        return f(*args, **(kwargs or {}))


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def hooks_on_all(seen: list[Any]) -> Iterator[None]:
    handle = all_modules.register_module_forward_hook(lambda m, a, y: seen.append(type(y)))
    try:
        yield
    finally:
        handle.remove()


def with_gradients(model: nn.Module, x: Any) -> Any:
    """The answer, and what its backward pass leaves in the parameters and in the argument."""
    model.zero_grad()
    answer = model(x)
    found = [t for t in tree_leaves(answer) if isinstance(t, Tensor) and t.requires_grad]
    if found:
        torch.stack([t.float().pow(2).sum() for t in found]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return answer, grads, getattr(x, "grad", None)


def watched(model: nn.Module, x: Any) -> Any:
    with Operations() as mode, torch.no_grad():
        answer = model(x)
    return answer, mode.seen


def hooked(model: nn.Module, x: Any) -> Any:
    seen: list[Any] = []
    with hooks_on_all(seen), torch.no_grad():
        return model(x), len(seen)


def in_a_thread(model: nn.Module, x: Any) -> Any:
    answers: list[Any] = []

    def call() -> None:
        torch.manual_seed(2)
        with torch.no_grad():
            try:
                answers.append(model(x))
            except Exception as error:
                answers.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def with_other_weights(model: nn.Module, x: Any) -> Any:
    with torch.no_grad():
        return functional_call(model, {n: p * 1.5 for n, p in model.named_parameters()}, (x,))


def by_parts(model: nn.Module, x: Any) -> Any:
    """The children's answers: what fusing the whole does to a child is seen by its other users."""
    with torch.no_grad():
        return [child(x) for child in model.children() if not isinstance(child, nn.ModuleList)]


def within(*contexts: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    def call(model: nn.Module, x: Any) -> Any:
        with contexts[0](), (contexts[1] if len(contexts) > 1 else nullcontext)():
            return model(x)

    return call


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "no_grad": within(torch.no_grad),
    "inference": within(torch.inference_mode),
    "inference inside no_grad": within(torch.no_grad, torch.inference_mode),
    "gradients on": lambda model, x: model(x),
    "backward": with_gradients,
    "autocast": within(torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast off": within(torch.no_grad, lambda: torch.autocast("cpu", enabled=False)),
    "default dtype": within(torch.no_grad, default_dtype),
    "function mode": within(torch.no_grad, Functions),
    "dispatch mode": watched,
    "device": within(torch.no_grad, lambda: torch.device("cpu")),
    "without oneDNN": within(torch.no_grad, lambda: torch.backends.mkldnn.flags(enabled=False)),
    "keyword": lambda model, x: torch.no_grad()(model)(x=x),
    "hooks on all": hooked,
    "thread": in_a_thread,
    "other weights": with_other_weights,
    "parts": by_parts,
    "vmap": lambda model, x: torch.no_grad()(torch.vmap(model))(x[None]),
    "forward": lambda model, x: torch.no_grad()(model.forward)(x),
}
