"""calibrate: runs a model on images in float32 and finds the ranges of its values, for int8."""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from resfuse.kernels.engine.frontend.export import capture, is_in_training
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.quantization.calibration_images import (
    ImageCheck,
    Images,
    feed_forwards,
    is_loop,
    items_of,
)
from resfuse.kernels.engine.quantization.methods import METHODS, NEED_NO_HISTOGRAM, PERCENTILE
from resfuse.kernels.engine.quantization.node_digests import node_digests
from resfuse.kernels.engine.quantization.observed_value import ObservedValue
from resfuse.kernels.engine.quantization.ranges import Ranges, ValueRange, rounded
from resfuse.kernels.engine.runtime.default_device import without_meta
from resfuse.kernels.engine.runtime.own_weights import require_usable
from resfuse.kernels.engine.tactics import eager

_FEW, _USUAL = 32, 300  # images


@without_meta()
def calibrate(
    model: nn.Module,
    images: Images,
    *,
    method: str = "minmax",
    samples: int | None = None,
    batch_size: int = 16,
    percentile: float = PERCENTILE,
) -> Ranges:
    """Returns the ranges of a float32 model's values on images like those it is for.

    The model is captured as `build_engine` captures it and run in float32, batch norms folded.
    What is remembered does not grow with the number of images.

    Args:
        model: a module in eval mode, in float32, on the CPU, whose forward takes one tensor.
        images: a tensor [N, C, H, W]; a list, data set or DataLoader of tensors [C, H, W] or
            [N, C, H, W], or of tuples that begin with one; or a function that calls the model it
            is given, `lambda m: [m(x) for x in loader]`. They are preprocessed as the model wants
            them, of one shape, and not those that accuracy will be measured on. 300 are usual.
        method: how a range is chosen: "minmax", all that was seen; "percentile", without the
            largest and the smallest 0.01 %; "mse", of the least mean squared error; "entropy", of
            the least Kullback-Leibler divergence.
        samples: how many images to take, by default all.
        batch_size: how many images are run at a time.
        percentile: with method "percentile", the percentile of both ends.

    Raises:
        ValueError: there is no image, or one that is not finite, or all are constant; the model is
            in training mode, on another device, of another dtype or cannot be captured, or one of
            its values is not finite; the method is unknown, or a number out of bounds.

    Warns:
        UserWarning: there are fewer than 32 images.
    """
    return observe(model, images, method, samples, batch_size, percentile).ranges(
        method, percentile
    )


def observe(
    model: nn.Module,
    images: Images,
    method: str,
    samples: int | None,
    batch_size: int,
    percentile: float = PERCENTILE,
) -> "Calibration":
    """Runs a model on images, as `calibrate` does, and returns what was seen.

    Raises:
        ValueError: as `calibrate`.
    """
    _require_settings(method, samples, batch_size, percentile)
    _require_model(model)
    found = Calibration(model, samples, batch_size, method not in NEED_NO_HISTOGRAM)
    # Tensors of inference mode cannot be captured.
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        if is_loop(images):
            feed_forwards(model, images, found.take)
        else:
            for item in items_of(images):
                found.take(item)
                if found.full:
                    break
        found.finish()
    return found


def _require_settings(method: str, samples: int | None, batch_size: int, percentile: float) -> None:
    if method not in METHODS:
        raise ValueError(f"argument method: {method!r}; accepted: {', '.join(METHODS)}")
    for name, number in (("samples", samples), ("batch_size", batch_size)):
        if (number is not None or name != "samples") and (type(number) is not int or number < 1):
            raise ValueError(f"argument {name}: {number!r}; accepted: 1 and more")
    number = type(percentile) in (int, float)
    if not number or not 50 < percentile <= 100:
        raise ValueError(f"argument percentile: {percentile!r}; accepted: above 50, up to 100")


def _require_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"argument model: {type(model).__name__}; accepted: a torch.nn.Module")
    if is_in_training(model):
        raise ValueError("argument model: it is in training mode; call model.eval() first")
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if tensor.device.type != "cpu":
            raise ValueError(f"argument model: {name} is on {tensor.device}; accepted: on the CPU")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"argument model: {name} is {tensor.dtype}; accepted: torch.float32")


class Calibration:
    """Takes images as they come, runs the model on `batch_size` at a time, and observes.

    Attributes:
        images: how many were taken.
        observed: what was seen of each value, by its name.
        first: the graph for the first batch, and the model's state by name; None before there was
            one.
    """

    def __init__(
        self, model: nn.Module, samples: int | None, batch_size: int, distribution: bool
    ) -> None:
        self.observed: dict[str, ObservedValue] = {}
        self.images = 0
        self.first: tuple[Graph, dict[str, Tensor]] | None = None
        self._model, self._samples, self._batch_size = model, samples, batch_size
        self._distribution = distribution
        self._check = ImageCheck()
        self._waiting: list[Tensor] = []  # images for the next batch, fewer than batch_size
        self._digests: dict[str, str] | None = None
        self._whole: tuple[Graph, list[eager.Function]] | None = None  # of batch_size images
        self._ran = 0

    @property
    def full(self) -> bool:
        return self._samples is not None and self.images >= self._samples

    def take(self, item: object) -> None:
        """Takes the next images; all that are beyond `samples` are left out."""
        if self.full:
            return
        batch = self._check.batch(item)
        if self._samples is not None:
            batch = batch[: self._samples - self.images]
        self.images += len(batch)
        for part in _parts(
            batch, self._batch_size - sum(map(len, self._waiting)), self._batch_size
        ):
            self._waiting.append(part)
            if sum(map(len, self._waiting)) == self._batch_size:
                self._run(torch.cat(self._waiting))
                self._waiting = []
        if self._waiting:  # a loader may write its next batch into the memory of this one
            self._waiting[-1] = self._waiting[-1].clone()

    def finish(self) -> None:
        """Runs the model on what is left, once the last image has been taken."""
        if not self.images:
            raise ValueError("argument images: there is none; accepted: one or more, 300 are usual")
        if not self._check.varied:
            raise ValueError(
                "argument images: every image is one number throughout; accepted: images like "
                "those that the model is for"
            )
        if self._waiting:
            self._run(torch.cat(self._waiting))
            self._waiting = []
        if self.images < _FEW:
            warnings.warn(
                f"argument images: {self.images} of them; ranges are usually found on about "
                f"{_USUAL}, and other images may be clipped",
                UserWarning,
                stacklevel=5,
            )

    def ranges(self, method: str, percentile: float) -> Ranges:
        """Returns the ranges of what was seen, once it is finished."""
        assert self._digests is not None and self._check.image is not None
        values = {name: _chosen(value, method, percentile) for name, value in self.observed.items()}
        return Ranges(
            method, percentile if method == "percentile" else None, self.images,
            self._check.image, tuple(self._digests.items()), values,
        )  # fmt: skip

    def _run(self, batch: Tensor) -> None:
        graph, functions = self._captured(batch)
        x = batch.contiguous(memory_format=torch.channels_last)
        first = self._ran
        self._ran += len(batch)
        with torch.inference_mode():
            for name, value in values_of(graph, functions, x):
                if name not in self.observed:
                    self.observed[name] = ObservedValue(self._distribution)
                try:
                    self.observed[name].add(value)
                except ValueError as error:
                    raise ValueError(
                        f"argument model: its value {name}, on images {first} to "
                        f"{self._ran - 1}: {error}; accepted: models without"
                    ) from None

    def _captured(self, batch: Tensor) -> tuple[Graph, list[eager.Function]]:
        """Returns the graph for a batch of this size, and each node as a function."""
        if self._whole is not None and len(batch) == self._batch_size:
            return self._whole
        graph, state = capture(self._model, batch)
        require_usable([graph], state, graph.constants, "model")
        digests = node_digests(graph)
        if self._digests not in (None, digests):
            raise ValueError(
                f"argument images: for the last {len(batch)} the model computes something else "
                f"than for {self._batch_size}; accepted: a multiple of batch_size"
            )
        self._digests = digests
        self.first = self.first or (graph, state)
        functions = [eager.function_of(node, graph.values, state) for node in graph.nodes]
        if len(batch) == self._batch_size:
            self._whole = graph, functions
        return graph, functions


def _parts(batch: Tensor, first: int, size: int) -> Iterator[Tensor]:
    """Returns a batch in parts: one of up to `first` images, then of up to `size`."""
    yield batch[:first]
    yield from (batch[at : at + size] for at in range(first, len(batch), size))


def values_of(
    graph: Graph, functions: Sequence[eager.Function], x: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Runs a graph, and returns each float32 value as it is computed; a value is kept until its
    last reader has run.

    Args:
        functions: the nodes, in order, as eager.function_of returns them.
    """
    values = {graph.input: x}
    if x.dtype == torch.float32:
        yield graph.input, x
    for at, (node, function) in enumerate(zip(graph.nodes, functions, strict=True)):
        value = function(*(values[name] for name in node.inputs))
        values[node.name] = value
        if graph.values[node.name].dtype == torch.float32:
            yield node.name, value
        for name in {*node.inputs, node.name}:
            if graph.last_read.get(name, at) == at:
                del values[name]


def _chosen(value: ObservedValue, method: str, percentile: float) -> ValueRange:
    low, high = METHODS[method](value.histogram, percentile)
    clipped = 0.0
    if method not in NEED_NO_HISTOGRAM:  # zero is always stored
        clipped = value.histogram.share_beyond(min(low, 0.0), max(high, 0.0))
    means = value.means
    return ValueRange(
        rounded(low),
        rounded(high),
        rounded(clipped),
        None if means is None else tuple(map(rounded, means)),
    )
