"""What ResNet-50 would take on an H200, by kinds of kernels, step by step: predictions.

    python -m resfuse.tools.h200_budget

prints the table that stands in results/nvidia-h200/NOTES.md. A number is one of

measured    a time of NOTES.md's table of kernels, fp16 at batch 256: cuDNN's, once per convolution
predicted   the larger of bytes and FLOPs at a ceiling, times what its own kind of kernel was
            measured to take of that; or an estimate for a kernel that has not run, with its source

Nothing here is a result. Copies of the input and the output are counted at batch 1 alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resfuse.kernels.gpu.conv import conv_config
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of

# Ceilings measured on the H200 (28 November 2026). Of int8 there is no measurement: tensor cores do
# twice fp16's in the data sheet (1,979 and 989.5 TOPS), so twice its measured rate is assumed.
BYTES_PER_S = 4.149e12
FLOPS_PER_S = {"fp16": 768e12, "int8": 2 * 768e12}
ELEMENT_BYTES = {"fp16": 2, "int8": 1}
KINDS = ("stem, pool", "1x1", "3x3", "projection", "head")


@dataclass(frozen=True)
class Conv:
    """`count` equal convolutions of ResNet-50, and what one took by cuDNN in fp16 at batch 256."""

    count: int
    kind: str
    hw: int  # of the output's side
    c: int
    k: int
    r: int = 1
    stride: int = 1
    residual: bool = False
    cudnn_ms: float | None = None  # measured
    triton_ms: float | None = None  # our best tile, measured

    def floor_ms(self, n: int, mode: str) -> float:
        """Returns the larger of its bytes and FLOPs at the ceilings."""
        size, pixels = ELEMENT_BYTES[mode], self.hw**2 * n
        # a 1x1 of stride 2 reads a quarter of its pixels
        read = pixels * (self.stride**2 if self.r > 1 else 1) * self.c
        moved = size * (read + pixels * self.k * (1 + self.residual) + self.k * self.c * self.r**2)
        flops = 2 * pixels * self.k * self.c * self.r**2
        return limit_ms(moved, flops, mode)


def limit_ms(moved: float, flops: float, mode: str) -> float:
    return max(moved / BYTES_PER_S, flops / FLOPS_PER_S[mode]) * 1e3


CONVS = (
    Conv(1, "1x1", 56, 64, 64, cudnn_ms=0.058, triton_ms=0.060),
    Conv(2, "1x1", 56, 256, 64, cudnn_ms=0.123, triton_ms=0.121),
    Conv(3, "3x3", 56, 64, 64, 3, cudnn_ms=0.126, triton_ms=0.159),
    Conv(3, "1x1", 56, 64, 256, residual=True, cudnn_ms=0.262, triton_ms=0.246),
    Conv(1, "1x1", 56, 256, 128, cudnn_ms=0.153, triton_ms=0.157),
    Conv(1, "3x3", 28, 128, 128, 3, 2, cudnn_ms=0.093, triton_ms=0.116),
    Conv(3, "3x3", 28, 128, 128, 3, cudnn_ms=0.085, triton_ms=0.110),
    Conv(4, "1x1", 28, 128, 512, residual=True, cudnn_ms=0.122, triton_ms=0.135),
    Conv(3, "1x1", 28, 512, 128, cudnn_ms=0.067, triton_ms=0.069),
    Conv(1, "1x1", 28, 512, 256, cudnn_ms=0.097, triton_ms=0.108),
    Conv(1, "3x3", 14, 256, 256, 3, 2, cudnn_ms=0.085, triton_ms=0.104),
    Conv(5, "3x3", 14, 256, 256, 3, cudnn_ms=0.082, triton_ms=0.101),
    Conv(6, "1x1", 14, 256, 1024, residual=True, cudnn_ms=0.083, triton_ms=0.093),
    Conv(5, "1x1", 14, 1024, 256, cudnn_ms=0.047, triton_ms=0.048),
    Conv(1, "1x1", 14, 1024, 512, cudnn_ms=0.078, triton_ms=0.085),
    Conv(1, "3x3", 7, 512, 512, 3, 2, cudnn_ms=0.082, triton_ms=0.113),
    Conv(2, "3x3", 7, 512, 512, 3, cudnn_ms=0.080, triton_ms=0.096),
    Conv(3, "1x1", 7, 512, 2048, residual=True, cudnn_ms=0.058, triton_ms=0.064),
    Conv(2, "1x1", 7, 2048, 512, cudnn_ms=0.041, triton_ms=0.041),
    Conv(1, "projection", 56, 64, 256, cudnn_ms=0.149, triton_ms=0.185),
    Conv(1, "projection", 28, 256, 512, stride=2),
    Conv(1, "projection", 14, 512, 1024, stride=2),
    Conv(1, "projection", 7, 1024, 2048, stride=2),
)
PROJECTION_RATIO = 1.2  # of the floor, as the one measured
STEM_CUDNN_MS, HEAD_MS = 0.34, 0.03  # estimates: conv, ReLU and pool one by one; mean and fc
# Batch 1, us: estimates of 28 November's audit. A kernel of a network in one graph takes 3 us, the
# next begins 1 us later, and a call costs 30 us on the host besides.
KERNEL_US, GAP_US, HOST_US = 3.0, 1.0, 30.0

STEM = Conv(1, "stem, pool", 112, 3, 64, 7, 2)
SMS, CYCLES_PER_US = 132, 1830.0  # of an H200; the clock with which its data sheet counts

Times = dict[str, float]  # ms by kind


def by_cudnn() -> Times:
    """fp16, batch 256, convolution by convolution: measured but for the estimates above."""
    times = dict.fromkeys(KINDS, 0.0)
    for conv in CONVS:
        ms = conv.cudnn_ms or PROJECTION_RATIO * conv.floor_ms(256, "fp16")
        times[conv.kind] += conv.count * ms
    return times | {"stem, pool": STEM_CUDNN_MS, "head": HEAD_MS}


def folded(times: Times) -> Times:
    """Each projection in the 1x1 that adds it, at 1.25 of the pair's limit."""
    last = [c for c in CONVS if c.residual]
    saved = 0.0
    for conv, side in zip(last, [c for c in CONVS if c.kind == "projection"], strict=True):
        pixels, reads = conv.hw**2 * 256, conv.c + side.c
        together = 1.25 * limit_ms(
            2 * pixels * (reads + conv.k), 2 * pixels * conv.k * reads, "fp16"
        )
        assert conv.cudnn_ms is not None
        saved += conv.cudnn_ms - together
    return times | {"1x1": times["1x1"] - saved, "projection": 0.0}


def in_int8(ratio: Callable[[Conv], float]) -> Times:
    """Every convolution at its limit in int8 times `ratio`; the stem's three channels fill 3 of the
    32 bytes of a step, so it is bound by tensor cores that are nine tenths idle."""
    times = dict.fromkeys(KINDS, 0.0)
    for conv in CONVS:
        times[conv.kind] += conv.count * ratio(conv) * conv.floor_ms(256, "int8")
    pixels = 112 * 112 * 256
    stem = limit_ms(pixels * (4 * 3 + 64), 2 * pixels * 64 * 49 * 32, "int8")
    pool = limit_ms(pixels * 64 * 1.25, 0, "int8")
    image = limit_ms(224 * 224 * 3 * 256 * 5, 0, "int8")  # float32 read, int8 written
    return times | {"stem, pool": 1.25 * (stem + pool + image), "head": HEAD_MS}


def as_in_fp16(conv: Conv) -> float:
    """The share of its limit that our best tile took in fp16; of one not measured, its kind's
    mean."""
    if conv.triton_ms is not None:
        return conv.triton_ms / conv.floor_ms(256, "fp16")
    alike = [c.triton_ms / c.floor_ms(256, "fp16") for c in CONVS if c.triton_ms and c.r == conv.r]
    return sum(alike) / len(alike)


@dataclass(frozen=True)
class Step:
    """A line of the table: ms by kind, or a total alone where a change is of no one kind."""

    what: str
    times: Times
    source: str
    factor: float = 1.0  # of all kinds at once

    @property
    def ms(self) -> float:
        return self.factor * sum(self.times.values())


def _less(times: Times, **saved: float) -> Times:
    """Returns times less the ms saved, by kind ("conv1x1", "conv3x3", "stem")."""
    names = {"conv1x1": "1x1", "conv3x3": "3x3", "stem": "stem, pool"}
    return times | {names[key]: times[names[key]] - ms for key, ms in saved.items()}


def steps() -> list[Step]:
    """Returns the ladder at batch 256, each step with those before it but for int8."""
    first = by_cudnn()
    projections = folded(first)
    stem = _less(projections, stem=STEM_CUDNN_MS - 0.20)
    # two tails: the sum of cuDNN's convolutions, less what is predicted for the one kernel
    saved = (0.516 - 0.33) + (0.539 - 0.153 - 0.29)
    tails = _less(stem, conv3x3=2 * 0.126, conv1x1=saved - 2 * 0.126)
    plans = _less(tails, conv1x1=0.14)
    halo = _less(plans, conv3x3=0.12 + 0.20)
    return [
        Step("cuDNN, convolution by convolution", first,
             "49 of 53 times measured; three projections, stem and head estimated"),
        Step("+ projections folded", projections, "1.25 of the pair's limit; never run"),
        Step("+ stem in one kernel: the plan as it stands", stem, "estimate 0.20 ms; never run"),
        Step("+ tails of stage 1 that keep their weights", tails,
             "predicted 0.33 and 0.29 ms a tail, 0.476 measured without; candidates, never run"),
        Step("+ chunks of stage 1 only", tails,
             "`tiling=True`; 0 to -0.3 ms expected, none counted"),
        Step("+ cuDNN's own plans timed", plans,
             "half of the 0.28 ms that short 1x1s of stages 3, 4 lie above 1.15 of their limit"),
        Step("+ two half batches on two streams", plans,
             "`tiling=True`; 3 to 8 % expected, 5 % counted", 0.95),
        Step("+ halo kernel for the 3x3s of stages 1, 2", halo,
             "0.12 and 0.20 ms: x fetched once for nine taps, then bytes bound; not written", 0.95),
        Step("int8: the plan as it stands", in_int8(as_in_fp16),
             "each convolution's limit in int8, times how far our tile is from its limit in fp16"),
        Step("int8: at the limits", in_int8(lambda conv: 1.0), "no kernel does that"),
    ]  # fmt: skip


def batch_1() -> list[tuple[str, float, str]]:
    """Returns the ladder at batch 1, in us: what, us, source."""
    us = 51 * (KERNEL_US + GAP_US) + HOST_US
    found = [("the plan as it stands, 51 kernels", us, "3 us a kernel, 1 between, 30 of the host")]
    for what, saved, source in (
        ("programmatic dependent launch", 40.0, "the gaps, less what is not overlapped"),
        ("mean + fc in one, conv1 + projection in one", 2 * (KERNEL_US + GAP_US), "2 kernels"),
        ("output cloned inside the graph, no wait on the last stream", 10.0, "host"),
    ):
        us -= saved
        found.append((f"+ {what}", us, source))
    convs = [*(conv for conv in CONVS for _ in range(conv.count)), STEM]
    int8 = sum(max(KERNEL_US, _alone_us(conv)) + GAP_US for conv in convs)
    int8 += 4 * (KERNEL_US + GAP_US) + HOST_US  # conversion, pool, mean, classifier
    source = "3 us a kernel, or by conv_config's cycles where that is more: no sum is split in int8"
    return [*found, ("int8: 57 kernels", int8, source)]


def _alone_us(conv: Conv) -> float:
    """Returns the us of a convolution in int8 at batch 1, by the cost model of its tiles, whose
    times were 0.6 of what was measured in fp16 at batch 256."""
    side = conv.hw * conv.stride
    geometry = Geometry((conv.stride,) * 2, (conv.r // 2,) * 2)
    size = conv.c, side, side, conv.k, conv.r, conv.r
    problem = ConvProblem(1, *size, geometry, Epilogue(), dtypes_of("int8"))
    found = conv_config.candidates(problem)
    least = min(conv_config.cycles(problem, config, SMS) for config in found)
    return least / CYCLES_PER_US / 0.6


def ms_of(what: str) -> float:
    """Returns the ms at batch 256 of the step whose description ends so."""
    return next(step.ms for step in steps() if step.what.endswith(what))


def table() -> list[str]:
    """Returns the lines of NOTES.md's table: batch 256 by kinds of kernels, then batch 1."""
    lines = [
        f"| ResNet-50, fp16 but where it says int8 | {' | '.join(KINDS)} | ms | images/s | how |",
        f"| --- {'| ---: ' * (len(KINDS) + 2)}| --- |",
    ]
    for step in steps():
        cells = [f"{step.factor * step.times[kind]:.2f}" for kind in KINDS]
        lines.append(
            _line(f"256: {step.what}", cells, f"{step.ms:.2f}", 256 / step.ms, step.source)
        )
    for what, us, source in batch_1():
        lines.append(_line(f"1: {what}", [""] * len(KINDS), f"{us / 1e3:.3f}", 1e3 / us, source))
    return lines


def _line(what: str, cells: Sequence[str], ms: str, images_per_ms: float, source: str) -> str:
    rate = f"{1e3 * images_per_ms:,.0f}"
    return f"| {what} | {' | '.join(cells)} | {ms} | {rate} | {source} |"


def main() -> None:
    print("\n".join(table()))


if __name__ == "__main__":
    main()
