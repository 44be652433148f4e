"""Tiles of the stem: which there are, which a problem allows, and which to take untried.

Pure Python; no GPU is asked.
"""

from dataclasses import dataclass
from functools import lru_cache

from resfuse.kernels.ops.conv_problem import MATH_MODES, ConvProblem, Geometry, dtypes_of
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed


@dataclass(frozen=True)
class StemProblem:
    """x [N, C, H, W] -> y [N, K, P2, Q2]."""

    n: int
    c: int
    h: int
    w: int
    k: int
    math_mode: str = "fp16"

    @property
    def conv(self) -> ConvProblem:
        geometry, dtypes = Geometry((2, 2), (3, 3)), dtypes_of(self.math_mode)
        return ConvProblem(self.n, self.c, self.h, self.w, self.k, 7, 7, geometry, dtypes=dtypes)

    @property
    def p2(self) -> int:
        return (self.conv.p - 1) // 2 + 1

    @property
    def q2(self) -> int:
        return (self.conv.q - 1) // 2 + 1

    @property
    def flops(self) -> int:
        return self.conv.flops

    @property
    def least_bytes(self) -> int:
        """x, w, bias and y once."""
        weights = self.k * (49 * self.c + 1)
        pixels = self.n * (self.h * self.w * self.c + self.p2 * self.q2 * self.k)
        return MATH_MODES[self.math_mode][1] * (pixels + weights)


@dataclass(frozen=True)
class Config:
    """A CTA makes block_m - 1 pooled columns x block_n channels, down `rows` pooled rows."""

    block_m: int
    block_n: int
    rows: int
    num_warps: int
    least_capability: int = 80  # 90: it spills on sm_80

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size not in (16, 32, 64, 128):
                raise ValueError(f"argument {name}: {size}; accepted: 16, 32, 64, 128")
        if self.rows < 1:
            raise ValueError(f"argument rows: {self.rows}; accepted: 1 or more")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"argument num_warps: {self.num_warps}; accepted: 1, 2, 4, 8")

    def label(self) -> str:
        return f"{self.block_m}x{self.block_n} rows {self.rows}"

    def lanes(self, problem: StemProblem) -> int:
        return problem.n * self.strips(problem) * problem.q2

    def strips(self, problem: StemProblem) -> int:
        return -(-problem.p2 // self.rows)

    def grid(self, problem: StemProblem) -> tuple[int, int]:
        tiles_m = -(-self.lanes(problem) // (self.block_m - 1))
        return (tiles_m, -(-problem.k // self.block_n))

    def ctas(self, problem: StemProblem) -> int:
        return self.grid(problem)[0] * self.grid(problem)[1]

    def check(self, problem: StemProblem) -> None:
        """Raises ValueError if the kernel would not compute `problem` right this way."""
        if not 1 <= problem.c <= 4:
            raise ValueError(f"argument problem: {problem.c} channels; accepted: 1 to 4")
        lanes_of_image = self.strips(problem) * problem.q2
        images = min(problem.n, self.block_m // lanes_of_image + 2)  # that a CTA may touch
        largest = max(problem.h * problem.w * problem.c, problem.p2 * problem.q2 * problem.k)
        if max(images * largest, self.lanes(problem) + self.block_m) >= 2**31:
            raise ValueError(
                f"argument problem: {problem}, {images} images a CTA; accepted: images of fewer "
                "than 2**31 elements together, and fewer lanes than that"
            )


# The largest tiles that do not spill, as compiled for sm_80, sm_90 and sm_100; speeds have not
# been measured. Rows are an argument of the kernel and cost no registers.
_HALF = ((128, 64, 8, 90), (64, 64, 4, 90), (64, 32, 4, 80))
_TILES = {
    "fp16": _HALF,
    "bf16": _HALF,
    "tf32": ((64, 32, 4, 90), (64, 32, 8, 80)),
    "ieee": ((32, 32, 8, 80),),
}
ROWS = (8, 4, 2, 1)


def _configs(math_mode: str) -> list[Config]:
    return [
        Config(block_m, block_n, rows, num_warps, capability)
        for block_m, block_n, num_warps, capability in _TILES[math_mode]
        for rows in ROWS
    ]


CONFIGS = tuple(dict.fromkeys(config for mode in _TILES for config in _configs(mode)))


def candidates(problem: StemProblem) -> list[Config]:
    """The shipped configurations that can do `problem`, largest tile and longest strip first."""
    found = []
    for config in _configs(problem.math_mode):
        try:
            config.check(problem)
        except ValueError:
            continue
        found.append(config)
    return found


@lru_cache(maxsize=4096)
def choose(
    problem: StemProblem,
    multiprocessors: int,
    capability: tuple[int, int] = (9, 0),
    barred: Barred = NONE,
) -> Config:
    """The longest strip in the largest tile that gives every multiprocessor a CTA; where none does,
    the shortest in the smallest. A heuristic: it has not been measured.

    Raises:
        ValueError: no configuration can do the problem, or all that can are barred.
    """
    arch = 10 * capability[0] + capability[1]
    fit = [c for c in candidates(problem) if c.least_capability <= arch]
    fit = allowed("stem", problem.math_mode, fit, barred)
    if not fit:
        Config(32, 32, 1, 8).check(problem)  # says why
        raise ValueError(
            f"argument capability: {capability} with {problem}; accepted: (8, 0) or newer"
        )
    return next((c for c in fit if c.ctas(problem) >= multiprocessors), fit[-1])
