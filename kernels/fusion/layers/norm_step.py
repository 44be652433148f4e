"""NormStep: act(bn(x) + residual), a batch norm that no convolution can take in.

On a GPU it launches a kernel, on a CPU a native step where one reads the layout; elsewhere, and
whatever else it is given, the layers compute.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.cpu.packed_norm import NativeNorm
from resfuse.kernels.cpu.weight_origin import (
    Origin,
    is_plain,
    sources_of,
    tensors_of,
    why_not_followed,
)
from resfuse.kernels.fusion.layers.fold_cache import lacks_statistics
from resfuse.kernels.fusion.layers.launch_signature import is_unseen, signature_of
from resfuse.kernels.fusion.layers.layer_calls import (
    finish_by_layers,
    is_followed,
    is_like,
    is_on_gpu,
    is_watched_or_cast,
)
from resfuse.kernels.fusion.matching.layer_kinds import slope_of
from resfuse.kernels.fusion.matching.match import Chain
from resfuse.kernels.fusion.tracing.memory_formats import (
    is_ambiguous,
    laid_out,
    strides_in,
    suggests_channels_last,
)
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.ops.bn_folding import bn_scale_shift
from resfuse.kernels.ops.conv_problem import Epilogue


class NormStep:
    """act(x * scale + shift + residual): a batch norm that no convolution can take in."""

    def __init__(self, chain: Chain) -> None:
        assert chain.norm is not None
        self.chain = chain.summary()
        self.name, self.norm, self.act = chain.name, chain.norm, chain.act
        self.activation, self.residual = chain.activation, chain.residual
        self.epilogue = Epilogue(chain.activation, chain.residual)
        self.keeps_dtype, self.norm_activates = chain.keeps_dtype, chain.norm_activates
        self.acts_in_place = chain.acts_in_place
        self.adds_to = chain.adds_to
        self._sources = sources_of(self.norm)
        self.threads: int | None = None  # that a native step runs on
        self._native: NativeNorm | None = None
        # Shape and strides of the last input that a native step took, and the norm's tensors then;
        # replaced at once, since other threads read them.
        self._accepted: tuple[torch.Size, tuple[int, ...], tuple[Any, ...]] | None = None
        # Scale, shift, and launches prepared with them (prepared_launch.py): replaced at once,
        # since other threads read them.
        self._made: tuple[Origin, Tensor, Tensor, dict[Any, Any]] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._repeats(x, residual) or self._is_native(x, residual):
            return self._by_native_step(x, residual)
        if not is_on_gpu(x) or x.dim() != 4 or (residual is not None and residual.shape != x.shape):
            return self.by_layers(x, residual)
        from resfuse.kernels.fusion.layers.prepared_launch import launched
        from resfuse.kernels.gpu.bn_act.bn_act import checked, launch_of

        tensors = tensors_of(self._sources)
        made = self._made
        if made is None or not made[0].is_where_it_was(tensors):
            if lacks_statistics(self.norm) or why_not_followed(self._sources) is not None:
                return self.by_layers(x, residual)
            made = (Origin(tensors), *bn_scale_shift(self.norm), {})  # type: ignore[arg-type]
            self._made = made
        _, scale, shift, launches = made
        slope = slope_of(self.act, x.shape[1])
        # A slope that is a tensor is the activation's own, and no part of what was made.
        if isinstance(slope, Tensor) or x.numel() == 0 or not is_unseen(x, residual):
            return checked(x, scale, shift, residual, slope, self.epilogue)
        x, residual = channels_last(x), None if residual is None else channels_last(residual)
        return launched(
            launches,
            (slope, *signature_of(x, residual)),
            x,
            residual,
            lambda: launch_of(x, scale, shift, residual, slope, self.epilogue),
        )

    def _is_native(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether a native step computes it, with eager's strides: of dense channels_last tensors
        in float32, whose norm is, too."""
        if not isinstance(x, Tensor) or not x.is_cpu or torch.compiler.is_compiling():
            return False
        if is_followed(x, residual):
            return False
        given = [x] if residual is None else [x, residual]
        if any(each.dtype != torch.float32 or not is_plain(each) for each in given):
            return False
        if x.dim() != 4 or x.numel() == 0 or is_ambiguous(x.shape):
            return False
        if any(each.shape != x.shape for each in given) or torch._C._is_any_autocast_enabled():
            return False
        if any(each.stride() != strides_in(x.shape, True) for each in given):
            return False
        held = self._readable()
        if held is None or any(len(each) != x.shape[1] for each in held if each is not None):
            return False
        if not NativeNorm.supports(x.shape[1], self.activation):
            return False
        self._accepted = x.shape, x.stride(), held
        return True

    def _repeats(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether `_is_native` has said so of such an input, and the norm's tensors are those."""
        kept = self._accepted
        if kept is None or residual is not None or is_watched_or_cast():
            return False
        if not is_like(x, kept[0], kept[1], torch.float32):
            return False
        held = self._held()
        return all(map(operator.is_, held, kept[2])) and all(
            each is None or each.is_contiguous() for each in held
        )

    def _held(self) -> tuple[Any, ...]:
        """Returns mean, variance, weight and bias."""
        found = vars(self.norm)["_parameters"] | vars(self.norm)["_buffers"]
        return tuple(map(found.get, ("running_mean", "running_var", "weight", "bias")))

    def _readable(self) -> tuple[Tensor | None, ...] | None:
        """Returns mean, variance, weight and bias, None where a native step cannot read them."""
        if lacks_statistics(self.norm):
            return None
        held = self._held()
        for each in held:
            if each is None:
                continue
            if not isinstance(each, Tensor) or not is_plain(each) or each.dtype != torch.float32:
                return None
            if not each.is_cpu or each.dim() != 1 or not each.is_contiguous():
                return None
        return held

    def _by_native_step(self, x: Tensor, residual: Tensor | None) -> Tensor:
        native = self._native
        if native is None:
            native = self._native = NativeNorm(x.shape[1], self.epilogue)
        mean, variance, weight, bias = self._held()
        eps: Any = self.norm.eps
        return native(x, residual, (mean, variance), (weight, bias), float(eps), self.threads)

    def with_eager_strides(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the result with the strides that eager's layers would have given it."""
        if not is_on_gpu(x) or torch.compiler.is_exporting():
            return self(x, residual)
        channels_last = suggests_channels_last(x)
        if x.dim() != 4 or (
            residual is not None and residual.stride() != strides_in(x.shape, channels_last)
        ):
            return self.by_layers(x, residual)
        return laid_out(self(x, residual), channels_last)

    def by_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return finish_by_layers(self, self.norm(x), residual)
