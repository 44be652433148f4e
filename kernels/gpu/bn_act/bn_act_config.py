"""Blocks of the batch norm: which there are, which a problem allows, and which to take untried.

Pure Python; no GPU is asked.
"""

from dataclasses import dataclass
from functools import lru_cache

from resfuse.kernels.ops.conv_problem import MATH_MODES
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed


@dataclass(frozen=True)
class BnActProblem:
    """x [N, C, H, W]; what a choice may depend on, and what it costs."""

    n: int
    c: int
    h: int
    w: int
    math_mode: str = "fp16"
    residual: bool = False

    @property
    def elements(self) -> int:
        return self.n * self.c * self.h * self.w

    @property
    def flops(self) -> int:
        return 2 * self.elements

    @property
    def least_bytes(self) -> int:
        """x, y and the residual once; scale and shift in fp32."""
        size = MATH_MODES[self.math_mode][1]
        return size * self.elements * (3 if self.residual else 2) + 8 * self.c


@dataclass(frozen=True)
class Config:
    """A CTA makes `block` elements of y that follow each other in memory."""

    block: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.block not in (2**i for i in range(5, 15)):
            raise ValueError(f"argument block: {self.block}; accepted: 32, 64, ... 16384")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"argument num_warps: {self.num_warps}; accepted: 1, 2, 4, 8")

    def ctas(self, problem: BnActProblem) -> int:
        return -(-problem.elements // self.block)

    def check(self, problem: BnActProblem) -> None:
        """Raises ValueError if the kernel cannot compute `problem` this way."""
        if self.ctas(problem) >= 2**31:
            raise ValueError(
                f"argument config: block {self.block} makes {self.ctas(problem)} CTAs of "
                f"{problem.elements} elements; accepted: less than 2**31"
            )


# Largest block first: 16, 8 and 8 elements a thread, one or two 16-byte vectors of fp16. Speeds
# have not been measured.
CONFIGS = (Config(4096, 8), Config(2048, 8), Config(1024, 4))


def candidates(problem: BnActProblem) -> list[Config]:
    """The shipped configurations that can do `problem`, largest block first."""
    return [config for config in CONFIGS if config.ctas(problem) < 2**31]


@lru_cache(maxsize=4096)
def choose(problem: BnActProblem, multiprocessors: int, barred: Barred = NONE) -> Config:
    """The largest block that gives every multiprocessor four CTAs, whose loads overlap; else the
    smallest. A heuristic: it has not been measured.

    Raises:
        ValueError: all configurations are barred.
    """
    fit = allowed("bn_act", problem.math_mode, candidates(problem), barred)
    return next((c for c in fit if c.ctas(problem) >= 4 * multiprocessors), fit[-1])
