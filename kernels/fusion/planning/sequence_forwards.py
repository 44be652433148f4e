"""Sequential.forward with fused blocks in it.

What one block hands to the next may stay flexible. Nothing else reads it, so the next block may add
its residual in place: oneDNN then writes over what it reads, instead of fetching the cache lines of
a new tensor first. Blocks in a row that are convolutions alone are run as one region of them, by
one native call.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from resfuse.kernels.fusion.layers.conv_region import ConvRegion
from resfuse.kernels.fusion.layers.fast_path import Signature, signature_of
from resfuse.kernels.fusion.planning.forward_variants import (
    are_contiguous,
    restore_layout,
    run_flexible,
)
from resfuse.kernels.fusion.planning.forwards import CalledModule, Variant
from resfuse.kernels.fusion.planning.plan import NOT_RUN, Plan, plan_of
from resfuse.kernels.fusion.tracing.memory_formats import InputFormat, preserves_layout

_MOST_SIGNATURES = 16  # of inputs for which the joined blocks are known


class _JoinedBlocks(NamedTuple):
    """Blocks in a row as one region."""

    region: ConvRegion
    stop: int  # the child behind the last of them
    donated: bool  # the next child may overwrite the result


_Joined = dict[int, _JoinedBlocks]  # by the first child


class SequenceForwards:
    """The forward of a Sequential with fused blocks in it."""

    fast_path = None  # the blocks have theirs

    def __init__(self, sequence: nn.Sequential) -> None:
        self._sequence = sequence
        self._joined: dict[tuple[InputFormat, bool, Signature], _Joined] = {}

    def compile_variants(self) -> dict[str, Any]:
        return {}

    def called_modules(self) -> list[CalledModule]:
        return [CalledModule(child, 1) for child in self._sequence.children()]

    def variant(
        self, input_format: InputFormat, flexible: bool, *, guarded: bool = False
    ) -> Variant:
        def forward(sequence: nn.Sequential, x: Any) -> Any:
            plan = plan_of(sequence)
            if plan is None or not plan.is_guarded() or not x.is_cpu:
                return _Run(sequence, input_format, flexible)(x, {})
            return self._run_guarded(_Run(sequence, input_format, flexible, plan), x)

        takes = input_format == "contiguous" and self._stays_flexible()
        return Variant(input_format, forward, None, None, takes, [])

    def input_format_of(self, args: tuple[Any, ...]) -> InputFormat:
        x = args[0]
        if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
            return "any"
        return "contiguous" if are_contiguous([x]) else "any"

    def region_for(self, x: Tensor, input_format: InputFormat, flexible: bool) -> ConvRegion | None:
        """Returns all that a guarded call with `x`, on a CPU, does, where that is convolutions
        without their checks; else None.
        """
        whole = self._joined.get((input_format, flexible, signature_of(x)), {}).get(0)
        restored = input_format == "contiguous" and not flexible
        if whole is None or whole.stop < len(self._sequence) or restored:
            return None
        return whole.region

    def reset(self) -> None:
        """Has the next call run block by block."""
        self._joined.clear()

    def _run_guarded(self, run: "_Run", x: Tensor) -> Any:
        key = run.input_format, run.flexible, signature_of(x)
        joined = self._joined.get(key)
        y = run(x, joined or {})
        if joined is None:
            if len(self._joined) >= _MOST_SIGNATURES:
                self._joined.clear()
            self._joined[key] = run.joined()
        return y

    def _stays_flexible(self) -> bool:
        plans = [(child, plan_of(child)) for child in self._sequence]
        return any(plan is not None for _, plan in plans) and all(
            plan.takes_flexible() if plan is not None else preserves_layout(child)
            for child, plan in plans
        )


class _Run:
    """One run of a Sequential; the plan has checked that the children have no hooks.

    Args:
        input_format: "any" where every child returns eager's strides.
        flexible: the argument, and the result, may be in any memory format.
        guarded: the sequence's plan, if it is guarded: then children may be joined.
    """

    def __init__(
        self,
        sequence: nn.Sequential,
        input_format: InputFormat,
        flexible: bool,
        guarded: Plan | None = None,
    ) -> None:
        self.input_format, self.flexible, self._guarded = input_format, flexible, guarded
        self._children = list(sequence._modules.values())
        # Of the children that were run by themselves: what each did, and whether its result is the
        # next child's to overwrite.
        self._regions: dict[int, tuple[ConvRegion | None, bool]] = {}

    def __call__(self, x: Any, joined: _Joined) -> Any:
        is_flexible, donated, is_contiguous = self.flexible, False, True
        at = 0
        while at < len(self._children):
            blocks = joined.get(at)
            if blocks is not None and self._guarded is not None and self._guarded.is_guarded():
                x = blocks.region(x)
                at, donated, is_flexible = blocks.stop, blocks.donated, True
                continue
            child = self._children[at]
            assert child is not None
            plan = plan_of(child)
            if self.input_format == "any":
                x, donated = self._with_eager_strides(at, child, plan, x, donated)
            elif plan is not None and is_contiguous and plan.takes_flexible():
                y = run_flexible(child, plan, x, self.input_format, donated)
                self._note(at, plan, x, donated, self.input_format, True)
                x, is_flexible, donated = y, True, plan.returns_fresh
            elif (
                is_flexible
                and plan is None
                and preserves_layout(child)
                and not getattr(child, "inplace", False)
            ):
                x, donated = child(x), False
            else:
                x = child(restore_layout(x, self.input_format) if is_flexible else x)
                is_flexible, donated = False, False
                is_contiguous = is_contiguous and preserves_layout(child)
            at += 1
        return x if self.flexible or not is_flexible else restore_layout(x, self.input_format)

    def _with_eager_strides(
        self, at: int, child: nn.Module, plan: Plan | None, x: Any, donated: bool
    ) -> tuple[Any, bool]:
        """Returns a child's result, and whether the next one may overwrite it."""
        if plan is None or child.training:
            return child(x), False
        y = plan.run(child, (x,), {}, donated)
        if y is NOT_RUN:
            return child(x), False
        self._note(at, plan, x, donated, None, False)
        return y, plan.returns_fresh

    def _note(
        self,
        at: int,
        plan: Plan,
        x: Tensor,
        donated: bool,
        input_format: InputFormat | None,
        flexible: bool,
    ) -> None:
        """Notes what a child has done with `x`; the other arguments are those of Plan.run."""
        if self._guarded is not None and self._guarded.is_guarded():
            region = plan.region_for(x, donated, input_format, flexible)
            self._regions[at] = region, plan.returns_fresh

    def joined(self) -> _Joined:
        """Returns the children in a row that can be run as one region, after a run of each."""
        joined: _Joined = {}
        regions: list[ConvRegion] = []
        for at in range(len(self._children) + 1):
            region, donated = self._regions.get(at, (None, False))
            if region is not None and region.is_native():
                regions.append(region)
                behind = at + 1, donated
                continue
            if len(regions) > 1:
                joined[at - len(regions)] = _JoinedBlocks(ConvRegion.joined(regions), *behind)
            regions = []
        return joined
