"""Lists the algorithms (forms) that compute a convolution as a native step, and their block sizes.

Every form takes float32 or bfloat16, and all but Winograd's take uint8, NHWC, with channels padded
to whole vectors (`pitch`); see step.h.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from resfuse.kernels.cpu import program
from resfuse.kernels.cpu.library import Storage, constant, why_unavailable
from resfuse.kernels.cpu.program import (
    ACTIVATIONS,
    VALUE_BYTES,
    Step,
    lanes,
    mr,
    nr,
    storage_number,
    whole_vectors,
)
from resfuse.kernels.cpu.weight_layout import (
    direct_weights,
    grouped_weights,
    paired_weights,
    quad_weights,
    winograd_weights,
)
from resfuse.kernels.ops.conv_problem import ConvProblem, dtypes_of
from resfuse.kernels.ops.quantization import FLOAT32_PRODUCTS, INT32_PRODUCTS

Form = Literal["direct", "winograd", "grouped"]

# Bytes of input, or of transformed input, that a thread takes through all output channels at a
# time: from half of a large first-level cache to twice a second-level cache.
_DIRECT_BLOCKS = (1 << 17, 1 << 18, 1 << 19, 1 << 20)
_WINOGRAD_BLOCKS = (1 << 18, 1 << 20, 4 << 20)

_MATH_MODES: dict[str, Storage] = {"ieee": "fp32", "bf16": "bf16", "int8": "u8", "int8_fp32": "u8"}


@dataclass(frozen=True)
class NativeConfig:
    """The algorithm of a convolution and how its work is divided."""

    form: Form
    by_channel: bool  # threads divide the output channels, not the pixels
    block: int  # pixels (Winograd: 2x2 tiles) taken through all output channels at a time


def refusal(problem: ConvProblem) -> str | None:
    """Returns why no form computes `problem`, or None."""
    if problem.dtypes not in map(dtypes_of, _MATH_MODES):
        mixed = problem.math_mode in _MATH_MODES
        found = "mixed dtypes" if mixed else problem.math_mode
        return f"{found}; the native steps compute in float32, bfloat16 or int8"
    if (reason := why_unavailable(storage_of(problem))) is not None:
        return reason
    if problem.activation not in ACTIVATIONS:
        return f"no native {problem.activation}"
    row = problem.c // problem.groups * problem.s
    if not fits_row(row):
        return f"rows of {row} values; at most {constant('MAX_ROW')}"
    if storage_of(problem) == "u8" and (reason := _refusal_of_sums(problem)) is not None:
        return reason
    if not _is_direct(problem) and not _is_grouped(problem):
        return "groups that fill no more than half a vector"
    return None


def _refusal_of_sums(problem: ConvProblem) -> str | None:
    """Returns why no form computes the sums of a problem in uint8 exactly, or None."""
    if problem.residual and problem.math_mode == "int8_fp32":
        return "a residual in float32; the native steps add one in uint8"
    products = _products_of(problem)
    if products > INT32_PRODUCTS:
        return f"sums of {products} products; an int32 takes {INT32_PRODUCTS}"
    if products > FLOAT32_PRODUCTS and not _is_direct(problem):
        return f"groups with sums of {products} products; a float32 takes {FLOAT32_PRODUCTS}"
    return None


def candidates(problem: ConvProblem) -> Iterator[NativeConfig]:
    """Yields every configuration of `problem` that may be the fastest."""
    for form in forms(problem):
        yield from configs(form, problem)


def forms(problem: ConvProblem) -> Iterator[Form]:
    """Yields the algorithms that compute `problem`."""
    if _is_grouped(problem):
        yield "grouped"
    if _is_direct(problem):
        yield "direct"
    if _is_winograd(problem):
        yield "winograd"


def configs(form: Form, problem: ConvProblem) -> Iterator[NativeConfig]:
    """Yields the candidate block sizes of one algorithm."""
    if form == "grouped":
        yield NativeConfig("grouped", False, 0)
    elif form == "direct":
        yield from _in_blocks(form, problem, pixels_of(problem), _direct_bytes(problem))
    else:  # the transformed input of a tile: 16 values a channel
        yield from _in_blocks(form, problem, tiles_of(problem), 16 * 4 * problem.c)


def choose(problem: ConvProblem) -> NativeConfig:
    """Returns the configuration that is expected to be fastest, without measuring: Winograd where
    its 16 products a tile are fewer than 9 a pixel, and there are no groups.
    """
    saves = problem.groups == 1 and 16 * tiles_of(problem) < 9 * pixels_of(problem)
    first = next(forms(problem))
    return _choose_blocks("winograd" if saves and _is_winograd(problem) else first, problem)


def _choose_blocks(form: Form, problem: ConvProblem) -> NativeConfig:
    """Returns the block size of a form that is expected to be fastest.

    Threads divide the channels where a thread would have few pixels.
    """
    every = list(configs(form, problem))
    by_channel = pixels_of(problem) < 512 and problem.k >= 4 * nr()
    preferred = [c for c in every if c.by_channel == by_channel] or every
    return preferred[len(preferred) // 2]


def storage_of(problem: ConvProblem) -> Storage:
    """Returns the type that a problem's values are stored in."""
    return _MATH_MODES.get(problem.math_mode, "fp32")


def layout_weight(form: Form, weight: Tensor, groups: int, storage: Storage = "fp32") -> Tensor:
    """Returns a weight [K, C / groups, R, S], float32 or, for values in uint8, int8, packed as the
    form reads it.

    For values in bfloat16, direct convolutions have weights in bfloat16, and Winograd transformed
    ones. Those of groups are float32: they are few.
    """
    if form == "winograd":
        transformed = winograd_weights(weight, groups)
        return transformed if storage == "fp32" else transformed.bfloat16()
    if form == "grouped":
        return grouped_weights(weight.float())
    pack = {"fp32": direct_weights, "bf16": paired_weights, "u8": quad_weights}[storage]
    return pack(weight, groups)


def scratch_floats(problem: ConvProblem, config: NativeConfig) -> int:
    """Returns the floats of scratch memory that a thread needs."""
    floats: int = conv_step(problem, config).scratch_pitch
    return floats


def conv_step(problem: ConvProblem, config: NativeConfig, **where: float) -> Step:
    """Returns the step, with as much scratch memory for each thread as it needs by itself.

    Args:
        where: pointers and pitches, by their names in step.h; of uint8 also the scales and zero
            points there; and C, where channels of zeros lie behind those of x.
    """
    unstored = 0 if config.form == "grouped" else lacking(problem.k, problem.groups)
    step = Step(
        kind=program.kind(config.form),
        N=problem.n, H=problem.h, W=problem.w, C=where.pop("C", problem.c),
        K=problem.k if unstored else whole_vectors(problem.k),
        R=problem.r, S=problem.s, P=problem.p, Q=problem.q,
        stride_h=problem.stride[0], stride_w=problem.stride[1],
        pad_h=problem.padding[0], pad_w=problem.padding[1],
        dilation_h=problem.dilation[0], dilation_w=problem.dilation[1],
        groups=problem.groups,
        activation=program.activation(problem.activation),
        residual_last=problem.epilogue.residual_last,
        by_channel=config.by_channel, block=config.block,
        storage=storage_number(storage_of(problem)),
        y_fp32=problem.math_mode == "int8_fp32",
        **where,
    )  # fmt: skip
    if unstored:
        step.unstored = unstored
    step.scratch_pitch = program.scratch_floats(step)
    return step


def pixels_of(problem: ConvProblem) -> int:
    """Returns the number of output pixels of the batch."""
    return problem.n * problem.p * problem.q


def tiles_of(problem: ConvProblem) -> int:
    """Returns the number of 2x2 tiles of output pixels of the batch."""
    return problem.n * -(-problem.p // 2) * -(-problem.q // 2)


def _is_winograd(problem: ConvProblem) -> bool:
    return (
        (problem.r, problem.s) == (3, 3)
        and _is_direct(problem)
        and problem.stride == problem.dilation == (1, 1)
        and problem.c % lanes() == 0
        and storage_of(problem) != "u8"
    )


def _is_grouped(problem: ConvProblem) -> bool:
    exact = storage_of(problem) != "u8" or _products_of(problem) <= FLOAT32_PRODUCTS
    return exact and fits_grouped(problem.c, problem.k, problem.groups, problem.r * problem.s)


def _products_of(problem: ConvProblem) -> int:
    """Returns how many products are added up for each output."""
    return problem.c // problem.groups * problem.r * problem.s


def fits_row(values: int) -> bool:
    """Returns whether a window's rows may have so many values, of which padding needs as many
    zeros."""
    return values <= constant("MAX_ROW")


def fits_grouped(c: int, k: int, groups: int, taps: int) -> bool:
    """Returns whether the grouped form computes a convolution from `c` to `k` channels."""
    whole_groups = groups > 1 and c == k and lanes() % (c // groups) == 0
    return whole_groups and taps <= constant("MAX_TAPS") and whole_vectors(c) <= constant("MAX_ROW")


def lacking(k: int, groups: int) -> int:
    """Returns how many output channels the last vector of each of several groups lacks."""
    return 0 if groups == 1 else -(k // groups) % lanes()


def fits_apart(k: int, groups: int) -> bool:
    """Returns whether groups are computed one by one, in vectors of their own: of what is computed
    more than half is stored."""
    return groups == 1 or 2 * (k // groups) > lanes()


def _is_direct(problem: ConvProblem) -> bool:
    return fits_apart(problem.k, problem.groups)


def _direct_bytes(problem: ConvProblem) -> int:
    """Returns the bytes of input for each output pixel."""
    value = VALUE_BYTES[storage_of(problem)]
    return value * problem.c * problem.stride[0] * problem.stride[1]


def _in_blocks(
    form: Form, problem: ConvProblem, rows: int, bytes_of_each: int
) -> Iterator[NativeConfig]:
    budgets = _DIRECT_BLOCKS if form == "direct" else _WINOGRAD_BLOCKS
    whole = _whole_tiles(rows)
    blocks = {max(mr(), min(whole, budget // bytes_of_each // mr() * mr())) for budget in budgets}
    for by_channel in _divisions(problem):
        for block in sorted(blocks):
            yield NativeConfig(form, by_channel, block)


def _divisions(problem: ConvProblem) -> tuple[bool, ...]:
    """Returns whether threads may divide the output channels (True), the pixels (False)."""
    return (False, True) if problem.k > nr() else (False,)


def _whole_tiles(rows: int) -> int:
    return -(-rows // mr()) * mr()
