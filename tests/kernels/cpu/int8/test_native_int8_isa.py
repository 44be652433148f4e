"""The instructions by which uint8 is multiplied by int8: all give the same bits, and
$RESFUSE_CPU_ISA chooses among those that the processor has."""

import platform
from dataclasses import replace

import pytest
import test_native_int8_maps as maps
from torch import Tensor

from int8_steps import Int8Conv, random_conv
from native_problems import PROBLEMS, every_config
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu.library import bf16_isa, int8_isa, library
from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.ops.quantization import LEAST_WEIGHT, quantize_weights

pytestmark = pytest.mark.slow

NAMES = (
    "ResNet's stem", "no whole vectors", "two uneven slices", "three slices of a 1x1",
    "just under a vector", "groups of 4", "groups with few channels in", "depthwise with stride 2",
)  # fmt: skip
EXTREME = ("no whole vectors", "groups of 4", "depthwise with stride 2")


def answers() -> list[Tensor]:
    """Returns what every configuration computes, each of which is the twin's."""
    found = []
    for seed, name in enumerate(NAMES):
        conv = random_conv(PROBLEMS[name], seed, zero_point=130)
        for each in [conv, extreme(conv)] if name in EXTREME else [conv]:
            found += [each.require_right(config) for config in every_config(each.problem)]
    return found


def extreme(conv: Int8Conv) -> Int8Conv:
    """The convolution with weights down to -128, as a model's own may be, and values of 255."""
    step = conv.weight.abs().max() / -LEAST_WEIGHT
    whole = (conv.weight / step).round().clamp(LEAST_WEIGHT, 127)
    whole.flatten(1)[:, 0] = LEAST_WEIGHT
    narrow, _ = quantize_weights(whole * step)
    assert (narrow.amin((1, 2, 3)) == LEAST_WEIGHT).all()
    return replace(conv, weight=whole * step, x=conv.x.where(conv.x < 128, 255))


@pytest.mark.parametrize("isa", ["vnni", "avx2", "portable"])
def test_every_form_gives_the_twins_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native_library.ISA_VARIABLE, isa)
    if isa == "portable":  # its loops are compiled in 12 CPU seconds; with -O3 it is 20
        made = native_library.library
        monkeypatch.setattr(
            native_library, "library", lambda level="native", *flags: made(level, *flags, "-O1")
        )
    try:
        assert int8_isa() == isa
    except ValueError as reason:
        pytest.skip(str(reason))
    assert answers()


def on_vectors_of(level: str, patch: pytest.MonkeyPatch) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no x86 processor")
    patch.setattr(
        native_library, "library", lambda _="native", *flags: library(level, *flags, "-O1")
    )


@pytest.mark.parametrize(("level", "width"), [("x86-64-v2", 4), ("x86-64-v3", 8)])
def test_narrower_vectors_give_the_twins_bits(
    level: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without fused multiply-adds in the one, and with them in the other."""
    if level == "x86-64-v3" and lanes() == 8:
        pytest.skip("these are the vectors of all other tests")
    on_vectors_of(level, monkeypatch)
    assert lanes() == width
    assert answers()
    for channels in (33, 64):
        maps.test_max_pools_of_any_number_of_channels(channels)
    maps.test_every_value_converts_to_float32_and_back(3)
    maps.test_float32_is_rounded_half_to_even_and_clipped((2, 3, 5, 71), 1, maps.FINE)
    maps.test_float32_is_rounded_half_to_even_and_clipped((3, 17, 4, 4), 5, maps.FINE)
    maps.test_means(maps.SHAPES[0], maps.FINE)
    maps.test_average_pools(maps.SHAPES[0], True)
    maps.test_norms_activations_and_sums("prelu", "after", maps.FINE)


def test_a_name_for_each_storage_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(names: str, flags: str) -> tuple[str, str]:
        monkeypatch.setenv(native_library.ISA_VARIABLE, names)
        monkeypatch.setattr(native_library, "processor", lambda: f"flags\t\t: sse2 {flags}")
        return bf16_isa(), int8_isa()

    assert asked("", "") == ("fp32", "portable")
    assert asked("", "avx2") == ("fp32", "avx2")
    assert asked("", "avx2 avx_vnni") == ("fp32", "vnni")
    assert asked("", "avx2 avx512_bf16 avx512_vnni") == ("bf16", "vnni")
    assert asked("", "i8mm") == ("fp32", "vnni")
    assert asked("fp32", "avx2 avx512_bf16") == ("fp32", "avx2")
    assert asked("avx2", "avx2 avx512_bf16 avx512_vnni") == ("bf16", "avx2")
    assert asked("portable, bf16", "avx2 avx512_bf16") == ("bf16", "portable")
    for names, said in {
        "vnni": "this processor has no VNNI",
        "avx512": "accepted: bf16, fp32, vnni, avx2, portable",
        "fp32,avx3": "accepted: bf16, fp32, vnni, avx2, portable",
        "avx2,portable": "accepted: one of avx2, portable",
    }.items():
        with pytest.raises(ValueError, match=said):
            asked(names, "avx2")
    with pytest.raises(ValueError, match="this processor has no AVX2"):
        asked("avx2", "neon")
