"""Tiles of the block tail: which there are, which a problem allows, and which to take untried.

Pure Python; no GPU is asked.
"""

from dataclasses import dataclass

from resfuse.kernels.barred import NONE, Barred, allowed
from resfuse.kernels.problem import MATH_MODES


def _is_block(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def _require(owner: object, name: str, met: bool, accepted: str) -> None:
    if not met:
        raise ValueError(f"argument {name}: {getattr(owner, name)}; accepted: {accepted}")


@dataclass(frozen=True)
class TailProblem:
    """x [n, c, h, w] -> y [n, k, p, q], and y_next [n, d, p, q] unless d is 0."""

    n: int
    c: int
    h: int
    w: int
    k: int
    d: int = 0
    stride: int = 1
    math_mode: str = "fp16"

    @property
    def p(self) -> int:
        return (self.h - 1) // self.stride + 1

    @property
    def q(self) -> int:
        return (self.w - 1) // self.stride + 1

    @property
    def pixels(self) -> int:
        return self.n * self.p * self.q

    @property
    def flops(self) -> int:
        return 2 * self.pixels * (9 * self.c * self.c + self.c * self.k + self.k * self.d)

    @property
    def least_bytes(self) -> int:
        """x, residual, y, y_next, weights and biases, each moved once."""
        weights = self.c * (9 * self.c + 1) + self.k * (self.c + 1) + self.d * (self.k + 1)
        moved = self.n * self.h * self.w * self.c + self.pixels * (2 * self.k + self.d) + weights
        return MATH_MODES[self.math_mode][1] * moved

    def label(self) -> str:
        """`8x64x56x56 k256`, then stride and next channels where there are any."""
        stride = f" /{self.stride}" if self.stride != 1 else ""
        chain = f" next {self.d}" if self.d else ""
        return f"{self.n}x{self.c}x{self.h}x{self.w} k{self.k}{stride}{chain}"


@dataclass(frozen=True)
class Config:
    """A tile of block_m pixels; h is summed over block_k of its 9 c products at a time, and y made
    block_n of its channels at a time.

    row: the pipelined loop runs through the three taps of a window's row instead of starting again
        with every tap. Refused with more than four warps: a loop over taps and channels in one is
        what gave wrong convolutions with 8 warps on an H100 (pytorch #173068, #183989).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    row: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            _require(self, name, _is_block(getattr(self, name)), "powers of two from 16")
        _require(self, "num_warps", self.num_warps in (1, 2, 4, 8), "1, 2, 4, 8")
        _require(self, "num_stages", 1 <= self.num_stages <= 8, "1 to 8")
        if self.row:
            _require(self, "num_warps", self.num_warps <= 4, "1, 2, 4 with row")

    def label(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} w{self.num_warps} s{self.num_stages}{' row' if self.row else ''}"

    def check(self, problem: TailProblem) -> None:
        """Raises ValueError where the kernel would be wrong: it masks pixels, not channels."""
        for name in ("c", "d"):
            value = getattr(problem, name)
            _require(problem, name, value in (0, 64, 128, 256), "64, 128, 256, and 0 for d")
        _require(problem, "c", problem.c % self.block_k == 0, f"multiples of {self.block_k}")
        _require(problem, "k", problem.k % self.block_n == 0, f"multiples of {self.block_n}")
        _require(problem, "c", problem.c > 0, "64, 128, 256")
        _require(problem, "stride", problem.stride in (1, 2), "1, 2")


Table = dict[tuple[int, int], tuple[Config, ...]]  # (c, d) -> tiles, larger ones first
_LARGE, _SMALL = Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 3, row=True)
_SHALLOW = Config(64, 64, 64, 8, 2)
# What `resfuse inspect` found to fit sm_80, sm_90 and sm_100 without a spill. The limit is
# registers: they hold h of the whole tile, and y_next if there is one.
_BITS_16: Table = {
    (64, 0): (_LARGE, _SMALL),
    (64, 64): (_LARGE, _SMALL),
    (64, 128): (Config(128, 64, 64, 8, 2), _SHALLOW),
    # block_k = c leaves one step a tap, so that the pipeline runs through the row's three taps
    (128, 0): (Config(128, 64, 128, 8, 2), Config(128, 64, 64, 8, 2), _SMALL),
    (128, 128): (Config(128, 64, 128, 8, 2), _LARGE, _SMALL),
    (128, 256): (_SHALLOW,),
    (256, 0): (_SHALLOW,),
    (256, 256): (_SHALLOW, Config(64, 32, 64, 8, 2)),
}
_TF32: Table = {channels: (Config(64, 32, 32, 8, 2),) for channels in _BITS_16}
_TF32[128, 256] = _TF32[256, 256] = (Config(64, 16, 64, 8, 2),)
# Without tensor cores the operands pass through registers too: tiles of 32 pixels spill.
_IEEE: Table = {channels: (Config(16, 32, 32, 4, 2),) for channels in _BITS_16}
_IEEE[64, 128] = _IEEE[256, 256] = (Config(16, 32, 16, 8, 2),)
TILES: dict[str, Table] = {"fp16": _BITS_16, "bf16": _BITS_16, "tf32": _TF32, "ieee": _IEEE}
CONFIGS = tuple(
    dict.fromkeys(c for table in TILES.values() for configs in table.values() for c in configs)
)


def candidates(problem: TailProblem) -> list[Config]:
    """The shipped configurations for `problem`, larger tiles first; none if it is unsupported."""
    if problem.stride not in (1, 2):
        return []
    configs = TILES[problem.math_mode].get((problem.c, problem.d), ())
    return [config for config in configs if problem.k % config.block_n == 0]


def supports(problem: TailProblem) -> bool:
    """False where other kernels must be used: too many channels for a tile, or an odd number."""
    return bool(candidates(problem))


def choose(problem: TailProblem, multiprocessors: int, barred: Barred = NONE) -> Config:
    """The largest tile of which every multiprocessor gets one; else the smallest.

    Raises:
        ValueError: the problem is not supported, or all configurations for it are barred.
    """
    fitting = allowed("block_tail", problem.math_mode, candidates(problem), barred)
    if not fitting:
        raise ValueError(
            f"argument problem: {problem.label()} in {problem.math_mode}; accepted: stride 1 or 2, "
            "64, 128 or 256 channels of x, next output channels none, as many or twice as many up "
            "to 256, output channels a multiple of 64"
        )
    for config in fitting:
        if -(-problem.pixels // config.block_m) >= multiprocessors:
            return config
    return min(fitting, key=lambda config: config.block_m)
