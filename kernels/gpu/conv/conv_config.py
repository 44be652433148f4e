"""Tiles of the implicit GEMM: which there are, which a problem allows, and which to take untried.

Pure Python; no GPU is asked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from resfuse.kernels.ops.conv_problem import QUANTIZED_MODES, ConvProblem, Geometry, dtypes_of
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed

# The least of the GPUs we compile for: sm_80's 163 KB, with room for what the epilogue needs.
SHARED_BYTES = 160 << 10
# 255 registers a thread at most; the rest holds addresses and, for ieee, the operands themselves.
ACCUMULATORS = {"ieee": 64, "tf32": 128, "fp16": 128, "bf16": 128, "int8": 64, "int8_fp32": 64}
# Packed groups keep a second sum, and find the group of every address. Tiles within a quarter of
# the above spill nothing, or 16 bytes where ptxas aims for one more CTA; larger ones hundreds.
PACKED_SHARE = 4
INT32 = 1 << 31

# The cost model below, of one multiprocessor of an H200 and a cycle: dense multiply-accumulates
# from NVIDIA's data sheet, bytes from L2 as CUDA's tuning guide has them. Of 16 tiles in fp16 timed
# on an H200 they pick the fastest for six of ResNet-50's 3x3 convolutions at batch 256, and one 5 %
# behind for the seventh; as times they are too short, 0.6 of what was measured.
MACS_PER_CYCLE = {
    "ieee": 128, "tf32": 1024, "fp16": 2048, "bf16": 2048, "int8": 4096, "int8_fp32": 4096,
}  # fmt: skip
L2_BYTES_PER_CYCLE = 64
FILL_CYCLES = 500  # until the first loads of a pipelined loop have arrived


CHANNELS_INNER, TAPS_INNER, FLAT = LOOPS = "channels inner", "taps inner", "flat"


@dataclass(frozen=True)
class Config:
    """Tile sizes in the GEMM view (M = N*P*Q, N = K, K = C*R*S) and how a tile is worked on.

    group_m: rows of tiles that take turns over the same columns, for reuse in L2.
    loop: which of the two loops of the sum, over the filter's taps and over blocks of channels, is
        inside the other, or that they are one. The inner loop is the pipelined one: it is filled
        and drained each time it is run through, so the longer the better.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    loop: str = CHANNELS_INNER

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            _require(self, name, _is_power_of_two(getattr(self, name), 16), "powers of two from 16")
        _require(self, "num_warps", self.num_warps in (1, 2, 4, 8), "1, 2, 4, 8")
        _require(self, "num_stages", 1 <= self.num_stages <= 8, "1 to 8")
        _require(self, "group_m", self.group_m >= 1, "1 and more")
        _require(self, "loop", self.loop in LOOPS, ", ".join(LOOPS))

    @property
    def is_proven(self) -> bool:
        """False for what has to give the right answer on a device before it is used there: with
        eight warps a flattened loop over taps and channels was wrong on an H100 (pytorch #173068,
        triton #1254)."""
        return self.loop == CHANNELS_INNER or self.num_warps <= 4

    def label(self) -> str:
        inner = "" if self.loop == CHANNELS_INNER else f" {self.loop}"
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} w{self.num_warps} s{self.num_stages}{inner}"

    def check(self, problem: ConvProblem) -> None:
        """Raises ValueError where the kernel would not fit a GPU or would count past 2**31."""
        accumulators = self.block_m * self.block_n // (32 * self.num_warps)
        most = ACCUMULATORS[problem.math_mode]
        if self.pack(problem) > 1:
            most //= PACKED_SHARE
        if accumulators > most:
            raise ValueError(
                f"argument config: {accumulators} accumulators a thread; accepted: {most} at most "
                f"with {problem.math_mode} ({self})"
            )
        size = problem.dtype.itemsize
        if self.block_k * size < 32:
            raise ValueError(
                f"argument config: {self.block_k * size} bytes a step with {problem.math_mode}; "
                f"accepted: 32 and more ({self})"
            )
        shared = self.num_stages * (self.block_m + self.block_n) * self.block_k * size
        if shared > SHARED_BYTES:
            raise ValueError(
                f"argument config: {shared} bytes of shared memory with {problem.math_mode}; "
                f"accepted: {SHARED_BYTES} at most ({self})"
            )
        require_countable(problem, self.block_m)

    def pack(self, problem: ConvProblem) -> int:
        """Groups a tile covers: as many as fit BLOCK_N, their weights block-diagonal."""
        widest = max(problem.c, problem.k) // problem.groups
        return max(1, min(problem.groups, self.block_n // widest))

    def tiles(self, problem: ConvProblem) -> tuple[int, int]:
        """Tiles of pixels, tiles of output channels."""
        pack = self.pack(problem)
        channels = -(-pack * problem.k // problem.groups // self.block_n)
        pixels = problem.n * problem.p * problem.q
        return -(-pixels // self.block_m), -(-problem.groups // pack) * channels

    def channel_blocks(self, problem: ConvProblem) -> int:
        return -(-self.pack(problem) * problem.c // problem.groups // self.block_k)


def require_countable(problem: ConvProblem, block_m: int) -> None:
    """Raises ValueError where a kernel's 32-bit numbers would overflow: pixels, offsets into w, and
    offsets into x from the first image of a tile on. From tensor to tile they are 64-bit."""
    pixels = problem.p * problem.q
    padded = (problem.h + 2 * problem.padding[0]) * (problem.w + 2 * problem.padding[1])
    images = min(problem.n, block_m // pixels + 2)
    weights = problem.k * problem.r * problem.s * problem.c // problem.groups
    for name, count, what in (
        ("x", problem.n * pixels + block_m, "pixels of output"),
        ("x", images * padded * problem.c, "elements in the images of one tile"),
        ("weight", weights, "elements"),
    ):
        if count >= INT32:
            raise ValueError(f"argument {name}: {count} {what}; accepted: less than 2**31")


def _is_power_of_two(number: int, least: int) -> bool:
    return number >= least and number & (number - 1) == 0


def _require(config: object, name: str, holds: bool, accepted: str) -> None:
    if not holds:
        raise ValueError(f"argument {name}: {getattr(config, name)}; accepted: {accepted}")


# fp16 and bf16. On an H200, ResNet-50's 3x3 convolutions at batch 256 were 1.02 to 2 times as fast
# with the taps inside as with the same tile and the channels inside; the flat loops were not there.
HALF = (
    Config(128, 256, 64, num_warps=8, num_stages=3),
    Config(256, 128, 64, num_warps=8, num_stages=3),
    Config(128, 128, 64, num_warps=8, num_stages=3),
    Config(128, 128, 64, num_warps=4, num_stages=3, loop=TAPS_INNER),
    Config(128, 256, 64, num_warps=8, num_stages=3, loop=FLAT),
    Config(256, 128, 64, num_warps=8, num_stages=3, loop=FLAT),
    Config(128, 128, 64, num_warps=8, num_stages=4, loop=FLAT),
    Config(128, 128, 64, num_warps=4, num_stages=3, loop=FLAT),
    Config(256, 64, 64, num_warps=8, num_stages=3),
    Config(256, 64, 64, num_warps=8, num_stages=4, loop=FLAT),
    Config(128, 64, 64, num_warps=4, num_stages=4),
    Config(128, 64, 64, num_warps=4, num_stages=3, loop=TAPS_INNER),
    Config(128, 64, 64, num_warps=4, num_stages=3, loop=FLAT),
    Config(64, 128, 64, num_warps=4, num_stages=4),
    Config(64, 64, 64, num_warps=4, num_stages=4),
    Config(64, 64, 64, num_warps=4, num_stages=4, loop=TAPS_INNER),
    Config(64, 32, 64, num_warps=4, num_stages=4),
    Config(64, 32, 64, num_warps=4, num_stages=4, loop=TAPS_INNER),
    # narrow groups, packed
    Config(128, 32, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
    Config(64, 32, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
)
# elements twice as large, half as many a step
TF32 = (
    Config(128, 128, 32, num_warps=8, num_stages=3),
    Config(128, 64, 32, num_warps=4, num_stages=4),
    Config(128, 64, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
    Config(64, 64, 32, num_warps=4, num_stages=4),
    Config(64, 32, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
)
# no tensor cores: operands and accumulators share the registers
IEEE = (
    Config(64, 64, 16, num_warps=4, num_stages=2),
    Config(64, 32, 16, num_warps=4, num_stages=2),
    Config(32, 32, 16, num_warps=4, num_stages=2),
)
BY_MATH_MODE = {"fp16": HALF, "bf16": HALF, "tf32": TF32, "ieee": IEEE}
CONFIGS = HALF + TF32 + IEEE
# A step of 32 bytes at least, as an instruction takes. No more than 64 accumulators a thread: of
# larger tiles most spill on sm_80, for the epilogue holds them as integers and as numbers.
INT8 = (
    Config(128, 128, 64, num_warps=8, num_stages=4),
    Config(128, 128, 64, num_warps=8, num_stages=4, loop=FLAT),
    Config(256, 64, 64, num_warps=8, num_stages=4),
    Config(256, 64, 64, num_warps=8, num_stages=4, loop=FLAT),
    Config(128, 64, 128, num_warps=4, num_stages=3),
    Config(128, 64, 64, num_warps=4, num_stages=4, loop=TAPS_INNER),
    Config(128, 64, 64, num_warps=4, num_stages=4, loop=FLAT),
    Config(64, 64, 128, num_warps=4, num_stages=4),
    Config(64, 64, 64, num_warps=4, num_stages=4, loop=TAPS_INNER),
    Config(64, 32, 128, num_warps=4, num_stages=4),
    Config(64, 32, 128, num_warps=4, num_stages=4, loop=TAPS_INNER),
    # few channels, narrow groups
    Config(128, 64, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
    Config(64, 32, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
)
_OFFERED = BY_MATH_MODE | dict.fromkeys(QUANTIZED_MODES, INT8)


def candidates(problem: ConvProblem) -> list[Config]:
    """The shipped configurations for the problem, all of them valid, some of them yet to be proven
    on the device (Config.is_proven)."""
    taps = problem.r * problem.s
    return [
        config
        for config in _OFFERED[problem.math_mode]
        if _fits(config, problem) and not (config.loop != CHANNELS_INNER and taps == 1)
    ]


def _fits(config: Config, problem: ConvProblem) -> bool:
    try:
        config.check(problem)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=4096)
def choose(
    problem: ConvProblem, multiprocessors: int, barred: Barred = NONE, kernel: str = "conv_bn_act"
) -> Config:
    """The proven candidate with the least estimated time; the first of equals.

    Args:
        kernel: the name in KERNELS by which configurations are barred.

    Raises:
        ValueError: none fits, for a reason given by Config.check, or all that fit are barred.
    """
    proven = [config for config in candidates(problem) if config.is_proven]
    fitting = allowed(kernel, problem.math_mode, proven, barred)
    if not fitting:
        _OFFERED[problem.math_mode][-1].check(problem)
    return min(fitting, key=lambda config: cycles(problem, config, multiprocessors))


def cycles(problem: ConvProblem, config: Config, multiprocessors: int) -> float:
    """Estimated time, to rank configurations by: rounds of tiles, each of them steps that multiply
    or load, whichever takes longer, and a fill of the pipeline whenever the inner loop starts."""
    tiles_m, tiles_n = config.tiles(problem)
    rounds = -(-tiles_m * tiles_n // multiprocessors)
    return rounds * tile_cycles(
        problem, config, config.channel_blocks(problem), problem.r * problem.s
    )


def tile_cycles(problem: ConvProblem, config: Config, channel_blocks: int, taps: int) -> float:
    """Estimated time of one tile over so many blocks of channels and taps."""
    size = problem.dtype.itemsize
    multiplying = config.block_m * config.block_n / MACS_PER_CYCLE[problem.math_mode]
    loading = (config.block_m + config.block_n) * size / L2_BYTES_PER_CYCLE
    fills = {CHANNELS_INNER: taps, TAPS_INNER: channel_blocks, FLAT: 1}[config.loop]
    steps = channel_blocks * taps
    return steps * config.block_k * max(multiplying, loading) + fills * FILL_CYCLES


def resnet_problems(math_mode: str) -> Iterator[ConvProblem]:
    """The 3x3 convolutions of ResNet-50 and ResNeXt-50 32x4d, and ResNet-50's projections."""
    stages = ((56, 64), (28, 128), (14, 256), (7, 512))
    problem = partial(ConvProblem, dtypes=dtypes_of(math_mode))
    same, halving = Geometry(padding=(1, 1)), Geometry((2, 2), (1, 1))
    for n in (1, 32, 256):
        for hw, c in stages:
            yield problem(n, c, hw, hw, c, 3, 3, same)
        for hw, c in stages[1:]:
            yield problem(n, c, 2 * hw, 2 * hw, c, 3, 3, halving)
            yield problem(n, 2 * c, 2 * hw, 2 * hw, 4 * c, 1, 1, Geometry((2, 2)))
        for hw, c in stages:
            yield problem(n, 2 * c, hw, hw, 2 * c, 3, 3, same._replace(groups=32))


def closest_to_chosen(
    configs: Iterable[Config],
    problems: Sequence[ConvProblem],
    candidates: Callable[[ConvProblem], list[Config]],
) -> Iterator[tuple[Config, ConvProblem]]:
    """Each configuration with the convolution for which it comes closest to being chosen.

    Args:
        candidates: what is chosen from for a problem; every configuration is one of some problem's.
    """
    sms = 132  # an H200's
    offered = {problem: candidates(problem) for problem in problems}
    least = {p: min(cycles(p, config, sms) for config in offered[p]) for p in problems}
    for config in configs:
        yield (
            config,
            min(
                (problem for problem in problems if config in offered[problem]),
                key=lambda problem: cycles(problem, config, sms) / least[problem],
            ),
        )
