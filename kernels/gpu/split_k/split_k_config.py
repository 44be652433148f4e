"""Tiles and splits of split-K: which there are, which to take untried, and whether it pays at all.

Pure Python; no GPU is asked.
"""

from dataclasses import dataclass
from functools import lru_cache

from resfuse.kernels.gpu.conv import conv_config
from resfuse.kernels.gpu.conv.conv_config import (
    CHANNELS_INNER,
    L2_BYTES_PER_CYCLE,
    TAPS_INNER,
    tile_cycles,
)
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed

# From the last partial written until the last CTA has read the first one back: a fence, an atomic
# and a load. An estimate, not measured.
JOIN_CYCLES = 2500
# Of conv_bn_act's estimated time, that split-K must stay under to be worth a workspace.
PAYS_BELOW = 0.8


@dataclass(frozen=True)
class Config:
    """A tile, and over how many CTAs its reduction is split: by filter taps, by channels."""

    tile: conv_config.Config
    split_taps: int
    split_channels: int

    def __post_init__(self) -> None:
        for name in ("split_taps", "split_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"argument {name}: {getattr(self, name)}; accepted: 1 and more")

    @property
    def splits(self) -> int:
        return self.split_taps * self.split_channels

    def label(self) -> str:
        return f"{self.tile.label()} split {self.split_taps}x{self.split_channels}"

    def check(self, problem: ConvProblem) -> None:
        """Raises ValueError where the tile is not valid, or a CTA would have nothing to do."""
        if problem.groups != 1:
            raise ValueError(f"argument groups: {problem.groups}; accepted by split-K: 1")
        self.tile.check(problem)
        for name, units, splits in (
            ("split_taps", problem.r * problem.s, self.split_taps),
            ("split_channels", self.tile.channel_blocks(problem), self.split_channels),
        ):
            if (splits - 1) * -(-units // splits) >= units:
                raise ValueError(
                    f"argument {name}: {splits}; accepted: one that leaves none of its parts of "
                    f"{units} empty"
                )

    def taps_each(self, problem: ConvProblem) -> int:
        return -(-problem.r * problem.s // self.split_taps)

    def channel_blocks_each(self, problem: ConvProblem) -> int:
        return -(-self.tile.channel_blocks(problem) // self.split_channels)


_HALF = (
    conv_config.Config(64, 64, 64, num_warps=4, num_stages=4),
    conv_config.Config(64, 64, 64, num_warps=4, num_stages=4, loop=TAPS_INNER),
    conv_config.Config(64, 32, 64, num_warps=4, num_stages=4),
    conv_config.Config(64, 32, 64, num_warps=4, num_stages=4, loop=TAPS_INNER),
)
_TF32 = (
    conv_config.Config(64, 64, 32, num_warps=4, num_stages=4),
    conv_config.Config(64, 32, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
)
_IEEE = (
    conv_config.Config(64, 32, 16, num_warps=4, num_stages=2),
    conv_config.Config(32, 32, 16, num_warps=4, num_stages=2),
)
TILES = {"fp16": _HALF, "bf16": _HALF, "tf32": _TF32, "ieee": _IEEE}
SPLITS = tuple((taps, channels) for taps in (1, 3, 9) for channels in (1, 2, 4, 8, 16))
CONFIGS = tuple(Config(tile, *split) for tile in _HALF + _TF32 + _IEEE for split in SPLITS)


def candidates(problem: ConvProblem) -> list[Config]:
    """The shipped configurations for the problem, all of them valid; none for groups."""
    fitting = []
    for tile in TILES[problem.math_mode]:
        for config in (Config(tile, *split) for split in SPLITS):
            try:
                config.check(problem)
            except ValueError:
                continue
            if not (tile.loop != CHANNELS_INNER and config.taps_each(problem) == 1):
                fitting.append(config)
    return fitting


@lru_cache(maxsize=4096)
def choose(problem: ConvProblem, multiprocessors: int, barred: Barred = NONE) -> Config:
    """The candidate with the least estimated time; the first of equals.

    Raises:
        ValueError: none fits, for a reason given by Config.check, or all that fit are barred.
    """
    fitting = allowed("conv_bn_act_split_k", problem.math_mode, candidates(problem), barred)
    if not fitting:
        Config(TILES[problem.math_mode][-1], 1, 1).check(problem)
    return min(fitting, key=lambda config: cycles(problem, config, multiprocessors))


def cycles(problem: ConvProblem, config: Config, multiprocessors: int) -> float:
    """Estimated time, on conv_config's terms: rounds of parts of tiles, then the last CTA's sum."""
    tiles_m, tiles_n = config.tile.tiles(problem)
    rounds = -(-tiles_m * tiles_n * config.splits // multiprocessors)
    part = tile_cycles(
        problem, config.tile, config.channel_blocks_each(problem), config.taps_each(problem)
    )
    partial = config.tile.block_m * config.tile.block_n * 4 / L2_BYTES_PER_CYCLE
    return rounds * (part + partial) + config.splits * partial + JOIN_CYCLES


@lru_cache(maxsize=4096)
def pays(problem: ConvProblem, multiprocessors: int) -> bool:
    """True where split-K is estimated to be the better kernel for the problem."""
    if problem.groups != 1 or not candidates(problem):
        return False
    split = cycles(problem, choose(problem, multiprocessors), multiprocessors)
    whole = conv_config.choose(problem, multiprocessors)
    return split < PAYS_BELOW * conv_config.cycles(problem, whole, multiprocessors)
