"""The least time of one convolution, by the ceilings measured on the device."""

from collections.abc import Mapping

from resfuse.bench.roofline import Floor
from resfuse.kernels.problem import ConvProblem


def floor(problem: ConvProblem, ceilings: Mapping[str, float]) -> Floor | None:
    """The arithmetic, or moving every tensor once, whichever takes longer; None without ceilings.

    On a CPU the tensors may sit in a cache that is faster than the copy the ceiling was measured
    with, so only the arithmetic (with Winograd's saving granted) says what is impossible.
    """
    rate = ceilings.get(f"ceiling_{problem.math_mode}_tflops")
    copy = ceilings.get("ceiling_copy_gb_s")
    if not rate or not copy:
        return None
    arithmetic_ms = problem.flops / rate / 1e9
    winograd = (problem.r, problem.s) == (3, 3) and problem.stride == problem.dilation == (1, 1)
    # F(4x4, 3x3) needs a quarter of the multiplications (Lavin & Gray 2016).
    possible_ms = arithmetic_ms / 4 if winograd else arithmetic_ms
    return Floor(max(arithmetic_ms, problem.least_bytes / copy / 1e6), possible_ms)
