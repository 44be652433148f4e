"""The layout of steps that are fused by strips of rows (fused_rows.h): a convolution, what reads it
through windows, and 1x1 convolutions behind that.
"""

from collections.abc import Sequence
from itertools import accumulate

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.program import (
    ABSENT,
    Step,
    fused_run,
    local_floats,
    local_pixels,
    whole_lines,
    whole_vectors,
)
from resfuse.kernels.ops.conv_problem import ConvProblem


class RowLayout:
    """What each step of a run needs of a thread's scratch memory comes first, then the values that
    only the run reads.

    Args:
        conv: the first step, without addresses.
        reader: the second one, likewise.
        following: the 1x1 convolutions behind it.
        rows: of the reader in a strip.
    """

    def __init__(
        self, conv: Step, reader: Step, following: Sequence[ConvProblem], rows: int
    ) -> None:
        self.rows = rows
        pixels = local_pixels(fused_run("row_fused", [conv, reader], rows=rows))
        self.following = NativeConfig("direct", False, pixels)
        needed = [conv.scratch_pitch, reader.scratch_pitch]
        needed += [conv_candidates.scratch_floats(each, self.following) for each in following]
        *self.own, values = accumulate(map(whole_lines, needed), initial=0)
        channels = [conv.K, reader.K, *(each.k for each in following)][:-1]
        self.pitches = [whole_vectors(each) for each in channels]
        sizes = (local_floats(conv, pixels * pitch) for pitch in self.pitches)
        *self._values, self.floats = accumulate(sizes, initial=values)

    def fuse(self, steps: Sequence[Step], scratch: int) -> list[Step]:
        """Returns the run of the steps, whose places in scratch memory it sets.

        Args:
            scratch: the address of that memory, `floats` for each thread.
        """
        offsets = [ABSENT, *self._values, ABSENT]
        for i, step in enumerate(steps):
            step.scratch, step.scratch_pitch = scratch + 4 * self.own[i], self.floats
            step.x_local, step.y_local = offsets[i], offsets[i + 1]
        return fused_run(
            "row_fused", steps, scratch=scratch, scratch_pitch=self.floats, rows=self.rows
        )


def rows_within(rows: int, problem: ConvProblem, kernel: int, stride: int, dilation: int) -> int:
    """Returns the most rows of a reader that read at most `rows` of what `problem` makes: at least
    one, and no more than a map has.

    Args:
        kernel: of the reader's windows, in rows; likewise stride and dilation.
    """
    whole = -(-problem.p // stride)
    reach = (kernel - 1) * dilation
    return max(1, min(whole, (rows - 1 - reach) // stride + 1))


def is_pointwise(problem: ConvProblem) -> bool:
    """Whether each pixel of the output reads the same pixel of the input alone."""
    pointwise = (problem.r, problem.s, problem.stride, problem.padding, problem.groups)
    return pointwise == (1, 1, (1, 1), (0, 0), 1)
