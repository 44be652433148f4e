"""The images that `calibrate` is given: what each item holds, and what is refused."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# A tensor, a list, a data set or a DataLoader; or a function that calls the model it is given.
Images = Tensor | Iterable[Any] | Callable[[nn.Module], object]

_ACCEPTED = (
    "accepted: a tensor [N, C, H, W]; a list, a data set or a DataLoader of tensors [C, H, W] or "
    "[N, C, H, W], or of tuples that begin with one; or a function that calls the model"
)


def items_of(images: Any) -> Iterator[object]:
    """Returns what to iterate over: a tensor is one item."""
    if isinstance(images, Tensor):
        return iter([images])
    if isinstance(images, str | bytes | dict):
        raise ValueError(f"argument images: {type(images).__name__}; {_ACCEPTED}")
    if (
        not hasattr(images, "__iter__")
        and hasattr(images, "__getitem__")
        and hasattr(images, "__len__")
    ):
        return (images[at] for at in range(len(images)))  # torch's data sets
    if not isinstance(images, Iterable):
        raise ValueError(f"argument images: {type(images).__name__}; {_ACCEPTED}")
    return iter(images)


def first_images(images: Images, count: int) -> Tensor | None:
    """Returns the first images [N, C, H, W], at most `count` of them; None where to look at them
    would use them up: of an iterator, or a function that calls the model.

    Raises:
        ValueError: as ImageCheck.batch.
    """
    if is_loop(images) or iter(items_of(images)) is images:
        return None
    check, found = ImageCheck(), list[Tensor]()
    for item in items_of(images):
        found.append(check.batch(item))
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count].clone() if found else None


def is_loop(images: Images) -> TypeGuard[Callable[[nn.Module], object]]:
    """Returns whether images are a function that calls the model."""
    return callable(images) and not hasattr(images, "__iter__") and not hasattr(images, "__len__")


class ImageCheck:
    """Checks items one after another.

    Attributes:
        image: the shape of an image, None before the first.
        varied: whether any image so far is more than one number.
    """

    def __init__(self) -> None:
        self.image: tuple[int, ...] | None = None
        self.varied = False
        self._items = 0

    def batch(self, item: object) -> Tensor:
        """Returns the images [N, C, H, W] of the next item.

        Raises:
            ValueError: it is no dense float32 tensor of them on the CPU, its images have another
                shape than those before, or it holds NaN or infinity.
        """
        name = f"batch {self._items}"
        self._items += 1
        x = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(x, Tensor):
            raise ValueError(f"argument images: {name} is a {type(x).__name__}; {_ACCEPTED}")
        if x.layout != torch.strided or x.dim() not in (3, 4) or not x.numel():
            raise ValueError(
                f"argument images: {name} has shape {tuple(x.shape)} and layout {x.layout}; "
                "accepted: dense tensors [C, H, W] and [N, C, H, W], not empty"
            )
        if x.dtype != torch.float32:
            raise ValueError(f"argument images: {name} is {x.dtype}; accepted: torch.float32")
        if x.device.type != "cpu":
            raise ValueError(f"argument images: {name} is on {x.device}; accepted: on the CPU")
        x = x.detach()
        x = x[None] if x.dim() == 3 else x
        image = tuple(x.shape[1:])
        if self.image not in (None, image):
            raise ValueError(
                f"argument images: {name} has images {list(image)}, and those before it "
                f"{list(self.image or ())}; accepted: images of one shape"
            )
        self.image = image
        low, high = torch.aminmax(x.flatten(1), dim=1)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(
                f"argument images: {name} holds NaN or infinity; accepted: finite ones"
            )
        self.varied = self.varied or bool((low < high).any())
        return x


def feed_forwards(
    model: nn.Module, loop: Callable[[nn.Module], object], take: Callable[[Tensor], None]
) -> None:
    """Runs a function that calls the model, and takes what each call is given.

    Raises:
        ValueError: a call does not have one positional argument.
    """
    handle = None

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal handle
        if len(args) != 1 or kwargs:
            raise ValueError(
                f"argument images: it calls the model with {len(args)} arguments and "
                f"{len(kwargs)} by name; accepted: one argument"
            )
        assert handle is not None
        handle.remove()  # the model is captured while it takes the first images
        try:
            with torch.inference_mode(False):
                take(args[0])
        finally:
            handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            loop(model)
    finally:
        handle.remove()
