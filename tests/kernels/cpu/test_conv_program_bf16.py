"""Programs of convolutions that store bfloat16, some of them or all, between tensors of float32 or
bfloat16: the same bits as from one call for each convolution, which rounds what it reads and makes.
"""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bf16_graphs import require_rounded_once
from resfuse.kernels.cpu.conv_calls import ConvCall, with_conversions
from resfuse.kernels.cpu.conv_candidates import layout_weight
from resfuse.kernels.cpu.conv_program import ConvProgram
from resfuse.kernels.cpu.conversion import Conversion
from resfuse.kernels.cpu.library import Storage
from resfuse.kernels.cpu.packed_conv import NativeConv, refusal, supports
from resfuse.kernels.cpu.stem_pool import StemPool
from resfuse.kernels.cpu.weight_layout import paired_from, paired_weights
from resfuse.kernels.ops.conv_problem import Geometry

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16


def conv(
    c: int,
    k: int,
    kernel: int,
    *,
    groups: int = 1,
    stride: int = 1,
    storage: Storage | None = "bf16",
    dtype: torch.dtype = torch.float32,
) -> NativeConv:
    generator = torch.Generator().manual_seed(100 * c + k)
    weight = torch.randn(k, c // groups, kernel, kernel, generator=generator) / c**0.5
    bias = torch.randn(k, generator=generator)
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    return NativeConv(weight.to(dtype), bias.to(dtype), geometry, "relu", None, None, storage)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def one_by_one(calls: Sequence[ConvCall], inputs: Sequence[Tensor]) -> list[Tensor]:
    """All values, each convolution called by itself."""
    values = list(inputs)
    for call in calls:
        if isinstance(call.conv, StemPool):
            values.append(F.max_pool2d(values[call.x], 3, 2, 1))
            continue
        assert isinstance(call.conv, NativeConv)
        x = values[call.x]
        values.append(
            call.conv(x) if call.residual is None else call.conv.add(x, values[call.residual])
        )
    return values


def require_the_same(
    calls: Sequence[ConvCall], outputs: Sequence[int], inputs: Sequence[Tensor]
) -> None:
    program = ConvProgram(len(inputs), calls, outputs)
    want = [one_by_one(calls, inputs)[output] for output in outputs]
    given = [x.clone() for x in inputs]
    for _ in range(2):
        for y, right in zip(program(*given), want, strict=True):
            assert y.dtype == inputs[0].dtype and torch.equal(y, right)
            assert y.is_contiguous(memory_format=torch.channels_last)
    if not any(call.overwrite for call in calls):
        assert all(map(torch.equal, given, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("c", [3, 21, 24])
def test_a_block_of_odd_channels(c: int, n: int, dtype: torch.dtype) -> None:
    first = conv(c, 37, 3, dtype=dtype)
    second, third = conv(37, 48, 1, dtype=dtype), conv(48, 37, 3, stride=1, dtype=dtype)
    calls = [ConvCall(first, 0), ConvCall(second, 1), ConvCall(third, 2, residual=1)]
    require_the_same(calls, [3], [images(n, c, 9, 11, dtype=dtype)])


@pytest.mark.parametrize("n", [1, 2])
def test_strips_of_rows_of_an_inverted_residual_and_of_a_stem(n: int) -> None:
    wide = [conv(24, 160, 1), conv(160, 160, 3, groups=160), conv(160, 24, 1)]
    calls = [ConvCall(wide[0], 0), ConvCall(wide[1], 1), ConvCall(wide[2], 2, residual=0)]
    x = images(n, 24, 60, 61)
    program = ConvProgram(1, calls, [3])
    program(x)
    require_the_same(calls, [3], [x])
    require_the_same([ConvCall(conv(3, 64, 7, stride=2), 0), ConvCall(StemPool("bf16"), 1)], [2],
                     [images(n, 3, 150, 151)])  # fmt: skip


@pytest.mark.parametrize("kept", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_storages_that_take_turns(kept: tuple[int, ...]) -> None:
    """The odd channels of the input are read by windows, and as a residual."""
    storages: list[Storage] = ["fp32" if i in kept else "bf16" for i in range(3)]
    shapes = [(21, 32, 3), (32, 32, 3), (32, 21, 1)]
    convs = [conv(*shape, storage=s) for shape, s in zip(shapes, storages, strict=True)]
    calls = [ConvCall(convs[0], 0), ConvCall(convs[1], 1, 1), ConvCall(convs[2], 2, 0)]
    require_the_same(calls, [1, 3], [images(2, 21, 8, 9)])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_residual_that_is_overwritten(storage: Storage, dtype: torch.dtype) -> None:
    first, last = conv(16, 32, 3, dtype=dtype), conv(32, 32, 1, storage=storage, dtype=dtype)
    projection = conv(16, 32, 1, dtype=dtype)
    calls = [
        ConvCall(first, 0),
        ConvCall(projection, 0),
        ConvCall(last, 1, residual=2, overwrite=True),
    ]
    require_the_same(calls, [3], [images(2, 16, 8, 8, dtype=dtype)])
    given = [ConvCall(conv(32, 32, 3, storage=storage), 0, residual=0, overwrite=False)]
    require_the_same(given, [1], [images(2, 32, 8, 8)])


def test_several_inputs_and_outputs() -> None:
    left, right, last = conv(8, 16, 1), conv(12, 16, 3), conv(16, 40, 1, storage="fp32")
    calls = [ConvCall(left, 0), ConvCall(right, 1, residual=2), ConvCall(last, 3)]
    require_the_same(calls, [3, 4], [images(1, 8, 6, 6), images(1, 12, 6, 6)])


def test_there_is_one_conversion_where_storages_meet_and_none_elsewhere() -> None:
    narrow, kept = conv(16, 16, 1), conv(16, 16, 1, storage="fp32")
    calls = [
        ConvCall(narrow, 0), ConvCall(narrow, 1, 0), ConvCall(kept, 2, 0), ConvCall(kept, 3, 2),
        ConvCall(narrow, 4),
    ]  # fmt: skip
    made, outputs = with_conversions(1, calls, [4, 5], "fp32")
    kinds = [c.conv.makes if isinstance(c.conv, Conversion) else "" for c in made]
    assert kinds == ["bf16", "", "", "fp32", "", "", "bf16", "", "fp32"]
    assert [(c.x, c.residual) for c in made] == [
        (0, None), (1, None), (2, 1), (3, None), (4, 0), (5, 4), (6, None), (7, None), (8, None)
    ]  # fmt: skip
    assert outputs == [6, 9]
    assert with_conversions(1, calls[:2], [2], "bf16") == (calls[:2], [2])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(37, 21, 3), (16, 3, 7), (70, 64, 1), (32, 32, 3)])
def test_a_convolution_rounds_weights_and_values(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """In stride 2, where there is no Winograd form."""
    k, c, size = shape
    native = conv(c, k, size, stride=2, dtype=dtype)
    x, padding = images(2, c, 9, 10, dtype=dtype), size // 2
    y = native(x)
    generator = torch.Generator().manual_seed(100 * c + k)
    weight = torch.randn(k, c, size, size, generator=generator) / c**0.5
    bias = torch.randn(k, generator=generator).to(dtype)
    assert torch.equal(native.dense_weight(), weight.to(BF16).to(dtype))
    narrow = x.to(BF16).double(), weight.to(BF16).double(), bias.double()
    want = F.relu(F.conv2d(*narrow, 2, padding))
    assert y.dtype == dtype and torch.equal(y, y.to(BF16).to(dtype))
    require_rounded_once(y.to(BF16), want, 2e-5)


@pytest.mark.parametrize("shape", [(16, 1, 1, 1), (37, 5, 3, 2), (130, 8, 1, 3)])
def test_packed_pairs_are_unpacked(shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape).to(BF16)
    back = paired_from(paired_weights(weight.float()), weight.shape)
    assert torch.equal(back, weight) and back.is_contiguous(memory_format=torch.channels_last)


def test_what_no_native_step_computes_is_said() -> None:
    few, half = torch.zeros(15, 3, 1, 1), torch.zeros(16, 3, 1, 1).half()
    groups = Geometry(groups=9)
    assert refusal(few, Geometry(), "relu", "bf16") == "only 15 output channels"
    assert refusal(half, Geometry(), "relu") == "no native step in torch.float16"
    narrow = torch.zeros(18, 16, 3, 3)
    assert refusal(narrow, groups, "relu", "bf16") == "groups that fill no more than half a vector"
    wide = torch.zeros(63, 16, 3, 3)
    assert not supports(few, Geometry(), "relu") and supports(wide.to(BF16), Geometry(), "relu")


def test_tensors_of_another_dtype_are_refused() -> None:
    for native, x in (
        (conv(16, 16, 1), images(1, 16, 4, 4, dtype=BF16)),
        (conv(16, 16, 1, dtype=BF16), images(1, 16, 4, 4)),
    ):
        with pytest.raises(ValueError, match=f"accepted: {native.dtype} on the CPU"):
            native(x)


def test_packed_weights_take_half_the_memory() -> None:
    """Those of Winograd, too, rounded once from what they are in fp64."""
    weight = torch.randn(70, 24, 3, 3)
    for form in ("direct", "winograd"):
        wide, narrow = (layout_weight(form, weight, 1, storage) for storage in ("fp32", "bf16"))  # type: ignore[arg-type]
        assert narrow.dtype == BF16 and narrow.nbytes * 2 == wide.nbytes
    assert torch.equal(narrow, wide.to(BF16))
