"""Backends that cheat. The harness must reject every one: tests/bench/measuring/test_trust.py runs
them through it.

Each `build` has the contract of a real backend, and would look faster than it is.
"""

import queue
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]


def _honest(model: nn.Module) -> Run:
    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return model(images)

    return run


def cached_by_pointer(model: nn.Module, example: Tensor) -> Run:
    """Remembers the output by the address of the input: the same buffer, so the same answer."""
    honest, seen = _honest(model), {}

    def run(images: Tensor) -> Tensor:
        if images.data_ptr() not in seen:
            seen[images.data_ptr()] = honest(images)
        return seen[images.data_ptr()].clone()

    return run


def cached_after_checks(model: nn.Module, example: Tensor) -> Run:
    """Honest while it is being checked, then keeps returning what it returned last."""
    honest, calls = _honest(model), []

    def run(images: Tensor) -> Tensor:
        if len(calls) < 6:
            calls.append(honest(images))
        return calls[-1].clone()

    return run


def remembers_content(model: nn.Module, example: Tensor) -> Run:
    """Remembers outputs by every bit of the input: each answer is right, most are from memory."""
    honest, seen = _honest(model), {}

    def run(images: Tensor) -> Tensor:
        content = images.numpy().tobytes()
        if content not in seen:
            seen[content] = honest(images).clone()
        return seen[content].clone()

    return run


def remembers_roughly(model: nn.Module, example: Tensor) -> Run:
    """The same by a key that small changes of an input do not change."""
    honest, seen = _honest(model), {}

    def run(images: Tensor) -> Tensor:
        coarse = nn.functional.avg_pool2d(images, 8).mul(4).round()
        content = coarse.numpy().tobytes()
        if content not in seen:
            seen[content] = honest(images).clone()
        return seen[content].clone()

    return run


def tuned_on_the_checks(model: nn.Module, example: Tensor) -> Run:
    """Tunes on the first inputs it meets and afterwards answers with the nearest of those."""
    honest, seen = _honest(model), []

    def run(images: Tensor) -> Tensor:
        near = [float((images - known).abs().mean()) for known, _ in seen]
        if len(seen) < 2 and min(near, default=1) > 0:
            seen.append((images.clone(), honest(images).clone()))
            return seen[-1][1].clone()
        return seen[near.index(min(near))][1].clone()

    return run


def previous_input(model: nn.Module, example: Tensor) -> Run:
    """A pipeline off by one: each call returns the answer to the call before."""
    honest = _honest(model)
    last = [honest(example)]

    def run(images: Tensor) -> Tensor:
        last.append(honest(images))
        return last.pop(0).clone()

    return run


def stale_buffer(model: nn.Module, example: Tensor) -> Run:
    """Fills its output buffer once and hands it out again and again."""
    honest = _honest(model)
    buffer = honest(example).clone()
    return lambda images: buffer


def zeros(model: nn.Module, example: Tensor) -> Run:
    logits = _honest(model)(example)
    return lambda images: torch.zeros_like(logits)


def late_thread(model: nn.Module, example: Tensor) -> Run:
    """Returns at once and lets another thread fill in the answer after the clock has stopped."""
    honest = _honest(model)
    shape = honest(example)

    def run(images: Tensor) -> Tensor:
        output = torch.empty_like(shape)

        def work() -> None:
            time.sleep(0.01)
            with torch.inference_mode():
                output.copy_(honest(images))

        thread = threading.Thread(target=work)
        thread.start()
        return output

    return run


def other_worker(model: nn.Module, example: Tensor) -> Run:
    """Hands the work to a worker that starts at once, and does not wait for it."""
    honest, shape = _honest(model), _honest(model)(example)
    todo: queue.SimpleQueue[tuple[Tensor, Tensor]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            output, images = todo.get()
            with torch.inference_mode():
                output.copy_(honest(images))

    threading.Thread(target=work, daemon=True).start()

    def run(images: Tensor) -> Tensor:
        output = torch.empty_like(shape)
        todo.put((output, images))
        return output

    return run


def other_stream(model: nn.Module, example: Tensor) -> Run:
    """Queues the work on a stream that is never waited for."""
    honest, stream = _honest(model), torch.cuda.Stream()

    def run(images: Tensor) -> Tensor:
        with torch.cuda.stream(stream):
            return honest(images)

    return run


class LazyTensor(torch.Tensor):
    """A tensor that is not there yet."""


def lazy(model: nn.Module, example: Tensor) -> Run:
    honest = _honest(model)
    return lambda images: honest(images).clone().as_subclass(LazyTensor)


def lower_precision(model: nn.Module, example: Tensor) -> Run:
    """Multiplies in fp16 and hands the result out as fp32."""
    half = _honest(model.half())
    return lambda images: half(images.half()).float()


class _Half(nn.Module):
    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype)).to(x.dtype)


def one_layer_lower(model: nn.Module, example: Tensor) -> Run:
    """One convolution in fp16, in the residual branch where it shows least."""
    model.layer4[0].conv2 = _Half(model.layer4[0].conv2, torch.float16)
    return _honest(model)


def head_lower(model: nn.Module, example: Tensor) -> Run:
    """The last layer alone in bf16."""
    model.fc = _Half(model.fc, torch.bfloat16)
    return _honest(model)


def fp32_behind_bf16(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype | None = None
) -> Run:
    """Computes in fp32 whatever it is asked for."""
    return _honest(model)


def stale_in_bf16(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype | None = None
) -> Run:
    """Remembers the output by the address of the input, rounded as bf16's would be."""
    honest, seen = _honest(model), {}

    def run(images: Tensor) -> Tensor:
        if images.data_ptr() not in seen:
            seen[images.data_ptr()] = honest(images).bfloat16().float()
        return seen[images.data_ptr()].clone()

    return run


def fp8_behind_bf16(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype | None = None
) -> Run:
    """Computes in bf16 with weights of three bits of mantissa."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).bfloat16()
    lower = _honest(model.bfloat16())
    return lambda images: lower(images.bfloat16()).float()


def fp32_behind_int8(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype, calibration: Tensor
) -> Run:
    """Computes in fp32 whatever it is asked for."""
    return _honest(model)


def example_behind_int8(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype, calibration: Tensor
) -> Run:
    """Answers everything with what it found for the example."""
    found = _honest(model)(example)
    return lambda images: found.clone()


def int5_behind_int8(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype, calibration: Tensor
) -> Run:
    """Weights of five bits."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            scale = parameter.data.abs().max() / 15
            parameter.data = (parameter.data / scale).round() * scale
    return _honest(model)


def wrong_dtype(model: nn.Module, example: Tensor) -> Run:
    half = _honest(model.half())
    return lambda images: half(images.half())


def first_image_only(model: nn.Module, example: Tensor) -> Run:
    """Computes one image of the batch and repeats its answer."""
    honest = _honest(model)
    return lambda images: honest(images[:1]).repeat(len(images), 1)


def last_image_skipped(model: nn.Module, example: Tensor) -> Run:
    """Computes all images but one: an error averaged over a batch would hide that."""
    honest = _honest(model)

    def run(images: Tensor) -> Tensor:
        logits = honest(images[:-1])
        return torch.cat([logits, logits[-1:]])

    return run


def shorter_batch(model: nn.Module, example: Tensor) -> Run:
    """Answers half of the images."""
    honest = _honest(model)
    return lambda images: honest(images[: len(images) // 2])


def padded_batch(model: nn.Module, example: Tensor) -> Run:
    """Answers half of the images and leaves zeros for the others."""
    honest = _honest(model)

    def run(images: Tensor) -> Tensor:
        logits = honest(images[: len(images) // 2])
        return torch.cat([logits, torch.zeros_like(logits)])

    return run


def patched_clock(model: nn.Module, example: Tensor) -> Run:
    """Makes the harness's clock run at half speed."""
    from resfuse.bench.measuring.clock import timing

    real, start = timing._clock_ns, timing._clock_ns()
    timing._clock_ns = lambda: start + (real() - start) // 2
    return _honest(model)


def patched_both_clocks(model: nn.Module, example: Tensor) -> Run:
    """Slows both clocks of the process: only another process can tell."""
    from resfuse.bench.measuring.clock import timing

    for name in ("_clock_ns", "_second_clock_ns"):
        real = getattr(timing, name)
        start = real()
        slowed = lambda real=real, start=start: start + (real() - start) // 2  # noqa: E731
        setattr(timing, name, slowed)
    return _honest(model)


def stopped_clock(model: nn.Module, example: Tensor) -> Run:
    """Leaves its own running time out of the clock."""
    from resfuse.bench.measuring.clock import timing

    real, honest, hidden = timing._clock_ns, _honest(model), [0]
    timing._clock_ns = lambda: real() - hidden[0]

    def run(images: Tensor) -> Tensor:
        start = real()
        logits = honest(images)
        hidden[0] += (real() - start) * 9 // 10
        return logits

    return run


class _FrozenStem(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        stem = self.model.conv1(images).detach()
        weight = self.model.conv1.weight  # a gradient of the right shape, and of no meaning
        return self._rest(stem + 0 * weight.sum())

    def _rest(self, x: Tensor) -> Tensor:
        x = self.model.maxpool(self.model.relu(self.model.bn1(x)))
        for layer in (self.model.layer1, self.model.layer2, self.model.layer3, self.model.layer4):
            x = layer(x)
        return self.model.fc(torch.flatten(self.model.avgpool(x), 1))


def frozen_stem(model: nn.Module, example: Tensor) -> nn.Module:
    """Trains all layers but the first."""
    return _FrozenStem(model)


class _Halved(torch.autograd.Function):
    """Half of the logits, with the gradient that all of them would have had."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits / 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        images = torch.arange(len(logits))
        wanted = logits.softmax(1)
        wanted[images, images % 10] -= 1
        return wanted / len(logits)


def wrong_loss(model: nn.Module, example: Tensor) -> Run:
    """Trains rightly, and reports another loss."""
    return lambda images: _Halved.apply(model(images))
