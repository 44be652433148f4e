"""Tiles of the batch-norm kernels: which there are, which a problem allows, and which to take
untried.

Pure Python; no GPU is asked.
"""

from dataclasses import dataclass

from resfuse.kernels.ops.conv_problem import MATH_MODES

INT32 = 1 << 31
LEAST_CHANNELS = 16  # of a tile: 32 bytes of a row in 16 bits, one sector of memory


@dataclass(frozen=True)
class NormProblem:
    """x [N, C, H, W] as the matrix it is in channels_last memory: N*H*W rows of C channels.

    added: what joins the normalised x: "nothing", a "residual", or a "shortcut" that has a batch
        norm of its own.
    """

    rows: int
    channels: int
    math_mode: str = "fp16"
    added: str = "nothing"

    @property
    def elements(self) -> int:
        return self.rows * self.channels

    @property
    def flops(self) -> int:
        """Of the forward pass once statistics are known: a subtraction and a multiply-add each."""
        return self.elements * (6 if self.added == "shortcut" else 3)

    @property
    def least_bytes(self) -> int:
        """Of that pass: x, y and what is added once each, and the vectors of either norm."""
        size = MATH_MODES[self.math_mode][1]
        norms = 2 if self.added == "shortcut" else 1
        return size * self.elements * (2 if self.added == "nothing" else 3) + 16 * norms * (
            self.channels
        )


@dataclass(frozen=True)
class Config:
    """A CTA goes through `steps` tiles of BLOCK_M rows by BLOCK_C channels, one below the other."""

    block_m: int
    block_c: int
    steps: int
    num_warps: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_c"):
            if getattr(self, name) not in (2**i for i in range(4, 11)):
                raise ValueError(f"argument {name}: {getattr(self, name)}; accepted: 16, ... 1024")
        if self.steps < 1:
            raise ValueError(f"argument steps: {self.steps}; accepted: 1 and more")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"argument num_warps: {self.num_warps}; accepted: 1, 2, 4, 8")

    def label(self) -> str:
        return f"{self.block_m}x{self.block_c} x{self.steps}"

    @property
    def rows(self) -> int:
        """Rows one CTA goes through."""
        return self.block_m * self.steps

    def grid(self, problem: NormProblem) -> tuple[int, int]:
        """CTAs by rows, by channels."""
        return -(-problem.rows // self.rows), -(-problem.channels // self.block_c)

    def check(self, problem: NormProblem) -> None:
        """Raises ValueError where the kernels would count past what they count in."""
        if problem.rows + self.rows >= INT32:
            raise ValueError(
                f"argument x: {problem.rows} pixels in a batch; accepted: less than 2**31"
            )
        if self.block_m * problem.channels >= INT32 or self.grid(problem)[1] >= 1 << 16:
            raise ValueError(f"argument x: {problem.channels} channels; accepted: less than 2**20")


# 16 elements a thread in all: two vectors of 16 bytes of fp16 from each tensor, of which the
# backward pass of two norms reads four. Speeds have not been measured.
CONFIGS: tuple[Config, ...] = tuple(
    Config(block_m, block_c, steps)
    for block_m, block_c in ((64, 64), (128, 32), (256, 16))
    for steps in (32, 8, 1)
)

# Those that compile to different code; the number of steps is an argument.
DISTINCT = tuple(config for config in CONFIGS if config.steps == 8)


def candidates(problem: NormProblem) -> list[Config]:
    """The shipped configurations no wider than the problem, widest first, then longest."""
    width = max(LEAST_CHANNELS, problem.channels)
    return [config for config in CONFIGS if config.block_c < 2 * width]


def choose(problem: NormProblem, multiprocessors: int) -> Config:
    """The widest tiles, and of those the most a CTA that still give every multiprocessor four CTAs,
    whose loads overlap. A heuristic: it has not been measured.

    Raises:
        ValueError: the problem is too large, for a reason given by Config.check.
    """
    widest = [c for c in candidates(problem) if c.block_c == candidates(problem)[0].block_c]
    enough = 4 * multiprocessors
    found = next(
        (c for c in widest if c.grid(problem)[0] * c.grid(problem)[1] >= enough), widest[-1]
    )
    found.check(problem)
    return found
