"""Native pools, means, norms, gates, picks and conversions on uint8 against their twins."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from guarded_pages import GuardedPages
from int8_steps import nhwc, random_values, require_like_twin, whole
from native_problems import POOLS
from resfuse.kernels.cpu.program import (
    ACTIVATIONS,
    Step,
    activation,
    kind,
    require_done,
    runner,
    storage_number,
    whole_vectors,
)
from resfuse.kernels.cpu.weight_layout import per_channel
from resfuse.kernels.engine.ir.graph import MaxPool
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.quantization import (
    Quantization,
    affine_ref,
    average_pool_ref,
    dequantize,
    max_pool_ref,
    mean_ref,
    quantize,
)

pytestmark = pytest.mark.slow

FINE, COARSE = Quantization(0.0123, 7), Quantization(0.31, 200)
SHAPES = [(3, 10, 13, 5), (2, 16, 1, 1), (1, 130, 2, 3), (2, 3, 7, 7), (1, 64, 9, 9)]


def run(
    name: str, y_shape: Sequence[int], tensors: dict[str, Tensor], threads: int = 2,
    like: torch.dtype = torch.uint8, pad: bool = True, **numbers: Any,
) -> Tensor:  # fmt: skip
    """Returns y [N, C, P, Q] of a step; x and y have channels in whole vectors if `pad`."""
    pages = GuardedPages()
    placed = {field: pages.place(t) for field, t in tensors.items()}
    n, k, p, q = y_shape
    pitch = whole_vectors(k) if pad else k
    y = pages.place(torch.full((n, p, q, pitch), 77, dtype=like))
    step = Step(
        kind=kind(name), storage=storage_number("u8"), y=y.data_ptr(), y_pitch=pitch,
        x_pitch=placed["x"].shape[-1], N=n, K=k, P=p, Q=q,
        **{field: t.data_ptr() for field, t in placed.items()}, **numbers,
    )  # fmt: skip
    if "residual" in placed:
        step.residual_pitch = placed["residual"].shape[-1]
    require_done(runner("u8")(step, 1, threads))
    pages.require_intact()
    return y[..., :k].permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("threads", [1, 3])
def test_max_pools(name: str, threads: int) -> None:
    op, shape = POOLS[name]
    require_max_pool(op, shape, threads)


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 72, 257])
def test_max_pools_of_any_number_of_channels(channels: int) -> None:
    require_max_pool(MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (2, channels, 7, 9), 1)


def require_max_pool(op: MaxPool, shape: tuple[int, ...], threads: int) -> None:
    x = random_values(shape)
    window = op.kernel, op.stride, op.padding, op.dilation, op.ceil
    want = max_pool_ref(x, *window, op.padding_after)
    (r, s), (stride_h, stride_w) = op.kernel, op.stride
    (pad_h, pad_w), (dilation_h, dilation_w) = op.padding, op.dilation
    got = run(
        "max_pool", want.shape, {"x": whole(x)}, threads, C=shape[1], H=shape[2], W=shape[3],
        R=r, S=s, stride_h=stride_h, stride_w=stride_w, pad_h=pad_h, pad_w=pad_w,
        dilation_h=dilation_h, dilation_w=dilation_w, x_zero=9, y_zero=9,
    )  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("output", [FINE, COARSE, None])
def test_means(shape: tuple[int, ...], output: Quantization | None) -> None:
    x = random_values(shape)
    numbers, like = stored_as(output)
    got = run(
        "mean", (*shape[:2], 1, 1), {"x": whole(x)}, like=like, C=shape[1], H=shape[2],
        W=shape[3], x_zero=COARSE.zero_point, x_scale=COARSE.scale, **numbers,
    )  # fmt: skip
    require_like_twin(got, mean_ref(x, COARSE, output))


def stored_as(output: Quantization | None) -> tuple[dict[str, Any], torch.dtype]:
    if output is None:
        return {"y_fp32": 1}, torch.float32
    numbers = {"y_zero": output.zero_point, "y_inverse_scale": output.inverse_scale}
    return numbers, torch.uint8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count_padding", [False, True])
def test_average_pools(shape: tuple[int, ...], count_padding: bool) -> None:
    """Against torch's own average of the real numbers, too."""
    x = random_values(shape)
    real = torch.nn.functional.avg_pool2d(
        dequantize(x, COARSE).double(), 3, 2, 1, count_include_pad=count_padding
    )
    _, c, p, q = real.shape

    def counts(windows: int, size: int) -> Tensor:
        starts = [2 * i - 1 for i in range(windows)]
        inside = [min(start + 3, size) - max(start, 0) for start in starts]
        padded = [min(start + 3, size + 1) - start for start in starts]
        return torch.tensor(padded if count_padding else inside, dtype=torch.float32)

    rows, columns = counts(p, shape[2]), counts(q, shape[3])
    got = run(
        "average_pool", real.shape, {"x": whole(x), "w": rows, "slope": columns}, C=c,
        H=shape[2], W=shape[3], R=3, S=3, stride_h=2, stride_w=2, pad_h=1, pad_w=1,
        x_zero=COARSE.zero_point, x_scale=COARSE.scale, **stored_as(FINE)[0],
    )  # fmt: skip
    divisors = rows[:, None] * columns
    want = average_pool_ref(x, COARSE, FINE, (3, 3), (2, 2), (1, 1), divisors)
    require_like_twin(got, want)
    apart = (got.int() - quantize(real, FINE).int()).abs()
    assert int(apart.max()) <= 1 and int((apart > 0).sum()) <= max(1, apart.numel() // 500)


def test_picked_pixels_with_zero_points_behind() -> None:
    x = random_values((2, 70, 5, 6))
    rows, columns = torch.tensor([0.0, 2, 2, 4]), torch.tensor([1.0, 0, 5])
    picked = x[:, :, rows.long()][..., columns.long()]
    for channels in (None, torch.tensor([3.0, 69, 0, 5, 5])):
        tensors = {"x": whole(x), "w": rows, "slope": columns}
        if channels is not None:
            tensors["bias"] = channels
            chosen = picked[:, channels.long()]
        else:
            chosen = picked[:, :30]
        c = chosen.shape[1]
        got = run("pick", (2, 100, 4, 3), tensors, C=c, H=5, W=6, x_zero=9)
        assert torch.equal(got[:, :c], chosen) and bool((got[:, c:] == 9).all())
        tensors["w"] = torch.tensor([-1.0, 0, 2, 2, 4, -1])
        tensors["slope"] = torch.tensor([1.0, 0, 5, -1, -1])
        padded = run("pick", (2, 100, 6, 5), tensors, C=c, H=5, W=6, x_zero=9)
        assert torch.equal(padded, F.pad(got, (0, 2, 1, 1), value=9))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
@pytest.mark.parametrize("output", [FINE, None])
def test_norms_activations_and_sums(name: str, residual: str, output: Quantization | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, r = random_values((3, 70, 5, 3)), random_values((3, 70, 5, 3), 1)
    scale, shift = torch.randn(2, 70, generator=generator)
    slopes: Slope = {"prelu": torch.randn(70, generator=generator), "leaky_relu": 0.1}.get(name)
    tensors = {"x": whole(x), "w": per_channel(scale), "bias": per_channel(shift)}
    if slopes is not None:
        of_each = slopes if isinstance(slopes, Tensor) else torch.full((70,), slopes)
        tensors["slope"] = per_channel(of_each)
    if residual != "none":
        tensors["residual"] = whole(r)
    numbers, like = stored_as(output)
    got = run(
        "affine", x.shape, tensors, like=like, C=70, activation=activation(name),
        residual_last=residual == "after", x_zero=COARSE.zero_point, x_scale=COARSE.scale,
        residual_zero=99, residual_scale=0.05, **numbers,
    )  # fmt: skip
    want = affine_ref(
        x, scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), COARSE, output, name, slopes,
        None if residual == "none" else r, Quantization(0.05, 99), residual == "after",
    )  # fmt: skip
    require_like_twin(got, want, name)


def test_a_gate_is_an_images_scale() -> None:
    """The gate is dequantised to float32 first, with zeros behind its channels."""
    x, gate = random_values((1, 70, 5, 3)), random_values((1, 70, 1, 1), 1)
    padded = run(
        "to_fp32", (1, whole_vectors(70), 1, 1), {"x": nhwc(gate)}, like=torch.float32, C=70,
        x_zero=FINE.zero_point, x_scale=FINE.scale,
    )  # fmt: skip
    assert torch.equal(padded[:, :70], dequantize(gate, FINE)) and not padded[:, 70:].any()
    tensors = {"x": whole(x), "w": padded.reshape(-1), "bias": torch.zeros(whole_vectors(70))}
    got = run(
        "affine", x.shape, tensors, C=70, x_zero=COARSE.zero_point, x_scale=COARSE.scale,
        **stored_as(FINE)[0],
    )  # fmt: skip
    want = affine_ref(x, dequantize(gate, FINE), torch.zeros(1), COARSE, FINE)
    require_like_twin(got, want)


# Conversions


@pytest.mark.parametrize("shape", [(2, 3, 5, 71), (3, 17, 4, 4), (2, 70, 1, 1), (1, 64, 9, 9)])
@pytest.mark.parametrize("behind", [0, 1, 5])
@pytest.mark.parametrize("stored", [FINE, COARSE])
def test_float32_is_rounded_half_to_even_and_clipped(
    shape: tuple[int, ...], behind: int, stored: Quantization
) -> None:
    """NaN and what lies behind the channels become the zero point."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 130 * stored.scale
    half = torch.randint(-300, 300, (min(64, x.numel() // 2),), generator=generator) + 0.5
    x.view(-1)[: len(half)] = half * stored.scale
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-42, -0.0])
    x.view(-1)[-7:] = odd
    n, c, h, w = shape
    numbers, _ = stored_as(stored)
    got = run("to_u8", (n, c + behind, h, w), {"x": nhwc(x)}, C=c, pad=False, **numbers)
    assert torch.equal(got[:, :c], quantize(x, stored))
    assert bool((got[:, c:] == stored.zero_point).all())
    scaled = x.double() * stored.inverse_scale
    plain = (scaled.float().double().round() + stored.zero_point).clamp(0, 255)
    assert torch.equal(got[:, :c].double(), plain.nan_to_num(stored.zero_point))


@pytest.mark.parametrize("channels", [1, 3, 64, 70])
def test_every_value_converts_to_float32_and_back(channels: int) -> None:
    x = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(1, channels, 16, 16)
    x = x.contiguous()
    for stored in (FINE, COARSE, Quantization(1e-30, 0), Quantization(1e30, 255)):
        wide = run(
            "to_fp32", x.shape, {"x": nhwc(x)}, like=torch.float32, pad=False, C=channels,
            x_zero=stored.zero_point, x_scale=stored.scale,
        )  # fmt: skip
        assert torch.equal(wide, dequantize(x, stored))
        numbers, _ = stored_as(stored)
        back = run("to_u8", x.shape, {"x": nhwc(wide)}, pad=False, C=channels, **numbers)
        assert torch.equal(back, x)
