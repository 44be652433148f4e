"""Tiles of the 1x1 convolution: which there are, which a problem allows, and which to take untried.

Pure Python; no GPU is asked.
"""

from dataclasses import dataclass, fields
from functools import lru_cache

from resfuse.kernels.ops.conv_problem import ConvProblem, Pair
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed


@dataclass(frozen=True)
class Conv1x1Problem(ConvProblem):
    """A 1x1 convolution and its folded shortcut.

    shortcut_c: channels of the shortcut's input; 0 without one.
    aligned: every tensor starts at a multiple of 16 bytes, as descriptors want.
    """

    shortcut_c: int = 0
    shortcut_stride: Pair = (1, 1)
    aligned: bool = True

    @property
    def macs(self) -> int:
        return self.n * self.p * self.q * self.k * (self.c + self.shortcut_c)


@lru_cache(maxsize=4096)
def gemm_of(
    problem: ConvProblem,
    shortcut_c: int = 0,
    shortcut_stride: Pair = (1, 1),
    aligned: bool = True,
) -> Conv1x1Problem:
    """The convolution `problem` with a shortcut folded in; made once, as launches ask for it."""
    own = {field.name: getattr(problem, field.name) for field in fields(ConvProblem)}
    return Conv1x1Problem(
        **own, shortcut_c=shortcut_c, shortcut_stride=shortcut_stride, aligned=aligned
    )


SHARED_BYTES = 163 << 10  # of an sm_80 CTA; sm_90 and sm_100 have 227 KB


@dataclass(frozen=True)
class Config:
    """A CTA makes BLOCK_M pixels x BLOCK_N channels of y, BLOCK_K of the reduction at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            # 16: the least a dot takes; 256: the longest side of a descriptor's box
            if size not in (16, 32, 64, 128, 256):
                raise ValueError(f"argument {name}: {size}; accepted: 16, 32, 64, 128, 256")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"argument num_warps: {self.num_warps}; accepted: 1, 2, 4, 8")
        if not 1 <= self.num_stages <= 8:
            raise ValueError(f"argument num_stages: {self.num_stages}; accepted: 1 to 8")

    def label(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        how = "descriptors" if self.descriptors else "pointers"
        return f"{tile} w{self.num_warps} s{self.num_stages} {how}"

    def shared_bytes(self, problem: ConvProblem) -> int:
        """What the pipeline's buffers take; the epilogue re-uses them."""
        size = problem.dtypes.input.itemsize
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * size

    def tiles(self, problem: ConvProblem) -> int:
        m = problem.n * problem.p * problem.q
        return -(-m // self.block_m) * -(-problem.k // self.block_n)

    def check(self, problem: Conv1x1Problem) -> None:
        """Raises ValueError if the kernel cannot compute `problem` this way."""
        if (problem.r, problem.s) != (1, 1) or problem.groups != 1 or problem.padding != (0, 0):
            raise ValueError(
                f"argument problem: {problem.label()}, padding {problem.padding}; accepted: "
                "1x1, no padding, one group"
            )
        if not self.descriptors:
            return
        rows = [problem.c, problem.k]
        if problem.stride != (1, 1):
            raise ValueError(
                f"argument config: descriptors at stride {problem.stride}; accepted: (1, 1)"
            )
        if not problem.aligned or any(not is_row_aligned(c, problem) for c in rows):
            raise ValueError(
                f"argument config: descriptors for rows of {rows} {problem.math_mode} elements, "
                f"aligned: {problem.aligned}; accepted: rows that start at multiples of 16 bytes"
            )


def is_row_aligned(channels: int, problem: ConvProblem) -> bool:
    """True where rows of so many channels start at multiples of 16 bytes."""
    return channels * problem.dtypes.input.itemsize % 16 == 0


# Larger tiles first, of equal ones the faster. Compiled for sm_80, sm_90 and sm_100 in every math
# mode that takes them. Those of fp16 are the fastest of 23, or close to it, on some 1x1 convolution
# of ResNet-50 at batch 256 on an H200; the others have not been measured.
_TILES: tuple[tuple[int, int, int, int, int], ...] = (
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),  # fp32: as many bytes a row
    (128, 128, 64, 4, 2),
    (64, 256, 64, 8, 2),
    (256, 64, 32, 8, 3),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 2),
    (128, 64, 32, 4, 4),
    (64, 128, 64, 4, 2),
    (64, 64, 64, 4, 2),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
)
_SPILLING = Config(128, 128, 64, 4, 2, descriptors=False)
CONFIGS: tuple[Config, ...] = tuple(
    config
    for descriptors in (True, False)
    for config in (Config(*tile, descriptors) for tile in _TILES)
    if config != _SPILLING
)
# By descriptors alone, as conv_int8's other kernel has pointers; not measured. 64 bytes a step for
# 64 channels. With 64 accumulators a thread and 128 bytes a step a residual spills on sm_100.
INT8: tuple[Config, ...] = tuple(
    Config(*tile, descriptors=True)
    for tile in (
        (128, 128, 64, 8, 2),
        (128, 64, 128, 8, 3),
        (128, 64, 128, 8, 2),
        (128, 64, 64, 4, 2),
        (64, 64, 128, 4, 4),
        (64, 64, 128, 4, 2),
        (64, 64, 64, 4, 2),
    )
)


def candidates(problem: Conv1x1Problem) -> list[Config]:
    """The shipped configurations worth trying on `problem`, largest tile first."""
    size = problem.dtypes.input.itemsize
    wide = size == 4
    found = []
    for config in CONFIGS if size > 1 else INT8:
        try:
            config.check(problem)
        except ValueError:
            continue
        fits = config.shared_bytes(problem) <= SHARED_BYTES
        # a row of the pipeline's buffers is 128 bytes, TMA's widest swizzle, if there are as many
        fits = fits and config.block_k == (64 if size == 1 and problem.c <= 64 else 128 // size)
        # no buffers that stay empty: their memory would be another CTA's
        steps = -(-max(problem.c, problem.shortcut_c) // config.block_k)
        fits = fits and (wide or config.num_stages <= steps + 1)
        # no tile of which less than half is used
        fits = fits and config.block_n <= max(64, 2 * problem.k - 1)
        # without tensor cores a larger tile spills, and so does one that comes by descriptors
        plain = config.block_m == config.block_n == 64 and not config.descriptors
        fits = fits and (problem.math_mode != "ieee" or plain)
        if fits:
            found.append(config)
    return found


@lru_cache(maxsize=4096)
def choose(
    problem: Conv1x1Problem,
    multiprocessors: int,
    capability: tuple[int, int] = (9, 0),
    barred: Barred = NONE,
    kernel: str = "conv1x1",
) -> Config:
    """Descriptors where they can be, and the largest tile that gives every multiprocessor one;
    where none does, the smallest. A heuristic: it has not been measured.

    Args:
        kernel: the name in KERNELS by which configurations are barred.

    Raises:
        ValueError: all candidates are barred.
    """
    usable = [c for c in candidates(problem) if not c.descriptors or capability >= (9, 0)]
    fit = allowed(kernel, problem.math_mode, usable, barred)
    by_descriptors = [c for c in fit if c.descriptors]
    pool = by_descriptors or fit
    return next((c for c in pool if c.tiles(problem) >= multiprocessors), pool[-1])
