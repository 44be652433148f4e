"""The least time of one convolution, by the ceilings measured on the device."""

from collections.abc import Mapping

from resfuse.bench.measuring.probes.roofline import Floor
from resfuse.kernels.ops.conv_problem import ConvProblem

# A copy reaches 0.8 to 0.9 of a GPU's peak bandwidth; reading alone cannot pass the peak.
READ_OVER_COPY = 1.25


def floor(problem: ConvProblem, ceilings: Mapping[str, float], cold: bool = False) -> Floor | None:
    """Returns the time of the arithmetic or of moving every tensor once, whichever is longer; None
    without ceilings.

    What is impossible is less: Winograd's saving is granted, and on a CPU the tensors may sit in a
    cache that is faster than the copy the ceiling was measured with.

    Args:
        problem: the convolution.
        ceilings: this device's measured rates, keyed as in environments.csv.
        cold: nothing is in a cache when the clock starts, so that what is read comes from memory;
            what is written may still be on its way there when it stops.
    """
    rate = ceilings.get(f"ceiling_{problem.math_mode}_tflops")
    copy = ceilings.get("ceiling_copy_gb_s")
    if not rate or not copy:
        return None
    arithmetic_ms = problem.flops / rate / 1e9
    winograd = (problem.r, problem.s) == (3, 3) and problem.stride == problem.dilation == (1, 1)
    # F(4x4, 3x3) needs a quarter of the multiplications (Lavin & Gray 2016).
    possible_ms = arithmetic_ms / 4 if winograd else arithmetic_ms
    if cold:
        read_ms = problem.read_bytes / copy / 1e6 / READ_OVER_COPY
        possible_ms = max(possible_ms, read_ms)
    return Floor(max(arithmetic_ms, problem.least_bytes / copy / 1e6), possible_ms)
