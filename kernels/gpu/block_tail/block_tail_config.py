"""Tiles of the block tail: which there are, which a problem allows, and which to take untried.

Pure Python; no GPU is asked.
"""

from dataclasses import dataclass
from functools import lru_cache

from resfuse.kernels.ops.conv_problem import MATH_MODES
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed


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


# Taps that the pipelined loop runs through before it starts again.
TAP, ROW, WINDOW = TAPS = 1, 3, 9
MULTIPROCESSOR_WARPS = 8  # of CTAs that stay: more of them leave too few registers


@dataclass(frozen=True)
class Config:
    """A tile of block_m pixels; h is summed over block_k of its 9 c products at a time, and y made
    block_n of its channels at a time.

    taps: how many of a window's nine the pipelined loop runs through before it starts again.
    kept: of how many of the products, from the first on, the weights stay in shared memory, while
        CTAs go on from tile to tile (block_tail_resident.py): 0, 1 or all 3.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    taps: int = TAP
    kept: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            _require(self, name, _is_block(getattr(self, name)), "powers of two from 16")
        _require(self, "num_warps", self.num_warps in (1, 2, 4, 8), "1, 2, 4, 8")
        _require(self, "num_stages", 1 <= self.num_stages <= 8, "1 to 8")
        _require(self, "taps", self.taps in TAPS, "1, 3, 9")
        _require(self, "kept", self.kept in (0, 1, 3), "0, 1, 3")

    @property
    def is_proven(self) -> bool:
        """False for what has to give the right answer on a device before it is used there: with
        eight warps a loop over taps and channels in one was wrong on an H100 (pytorch #173068,
        triton #1254)."""
        return self.taps == TAP or self.num_warps <= 4

    def label(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        taps = f" taps {self.taps}" if self.taps != TAP else ""
        kept = f" keeps {self.kept}" if self.kept else ""
        return f"{tile} w{self.num_warps} s{self.num_stages}{taps}{kept}"

    def ctas(self, problem: TailProblem, multiprocessors: int) -> int:
        """One a tile, or as many as there is room for at once."""
        tiles = -(-problem.pixels // self.block_m)
        at_once = multiprocessors * MULTIPROCESSOR_WARPS // self.num_warps
        return min(tiles, at_once) if self.kept else tiles

    def check(self, problem: TailProblem) -> None:
        """Raises ValueError where the kernel would be wrong: it masks pixels, not channels."""
        for name in ("c", "d"):
            value = getattr(problem, name)
            _require(problem, name, value in (0, 64, 128, 256), "64, 128, 256, and 0 for d")
        _require(problem, "c", problem.c % self.block_k == 0, f"multiples of {self.block_k}")
        _require(problem, "k", problem.k % self.block_n == 0, f"multiples of {self.block_n}")
        _require(problem, "c", problem.c > 0, "64, 128, 256")
        if self.kept:
            _require(problem, "c", problem.c == 64, "64 where weights are kept")
            _require(self, "block_k", self.block_k == 64, "64 where weights are kept")
        _require(problem, "stride", problem.stride in (1, 2), "1, 2")


Table = dict[tuple[int, int], tuple[Config, ...]]  # (c, d) -> tiles, the one to take first first
_LARGE, _SMALL = Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 3, taps=ROW)
_SHALLOW = Config(64, 64, 64, 8, 2)
_WINDOW = Config(64, 64, 64, 4, 3, taps=WINDOW)
_LARGE_WINDOW = Config(128, 64, 64, 8, 3, taps=WINDOW)
# What `resfuse inspect` found to fit sm_80, sm_90 and sm_100 without a spill. The limit is
# registers: they hold h of the whole tile, and y_next if there is one. On an H200 in fp16, at batch
# 256, _SMALL was the fastest of a dozen tiles at 64 channels and at 128 with none or 128 next,
# 1.3 to 1.7 times as fast as _LARGE. Windows and kept weights were not there.
_BITS_16: Table = {
    (64, 0): (
        _SMALL,
        _WINDOW,
        _LARGE_WINDOW,
        Config(64, 64, 64, 4, 1, kept=3),
        Config(128, 64, 64, 8, 1, kept=3),
    ),
    (64, 64): (
        _SMALL,
        _WINDOW,
        _LARGE_WINDOW,
        Config(64, 64, 64, 4, 1, kept=1),
        Config(128, 64, 64, 8, 1, kept=1),
    ),
    (64, 128): (_SMALL, _SHALLOW),
    (128, 0): (_SMALL, _WINDOW, _LARGE_WINDOW, Config(128, 64, 64, 8, 3)),
    (128, 128): (_SMALL, _WINDOW, _LARGE, _LARGE_WINDOW),
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
    """The shipped configurations for `problem`, the one to take first first, some of them yet to be
    proven on the device (Config.is_proven); none if it is unsupported."""
    if problem.stride not in (1, 2):
        return []
    configs = TILES[problem.math_mode].get((problem.c, problem.d), ())
    return [config for config in configs if problem.k % config.block_n == 0]


def supports(problem: TailProblem) -> bool:
    """False where other kernels must be used: too many channels for a tile, or an odd number."""
    return bool(candidates(problem))


@lru_cache(maxsize=4096)
def choose(problem: TailProblem, multiprocessors: int, barred: Barred = NONE) -> Config:
    """The first proven tile of which every multiprocessor gets one; else the smallest.

    Raises:
        ValueError: the problem is not supported, or all configurations for it are barred.
    """
    proven = [config for config in candidates(problem) if config.is_proven]
    fitting = allowed("block_tail", problem.math_mode, proven, barred)
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
