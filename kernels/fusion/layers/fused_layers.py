"""The fused layers, or steps, that a rewritten forward calls in place of chains of layers.

Each stands for one chain (match.py), keeps what was folded from its layers, and folds again when
one of their tensors has changed.

x [N, C, H, W], residual [N, K, P, Q] -> y [N, K, P, Q], channels_last. On a GPU a step launches our
kernels; on a CPU a native step, oneDNN's fused convolution, or torch's own on folded weights. What
a step cannot do (another dtype, an empty batch, an image without a batch dimension) its layers do
themselves, so that results and errors stay theirs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels.cpu.weight_origin import (
    Origin,
    is_plain,
    sources_of,
    tensors_of,
)
from resfuse.kernels.fusion.layers.fast_path import FastPath, Miss
from resfuse.kernels.fusion.layers.fold_cache import (
    Asked,
    Fold,
    Folded,
    Packed,
    fold,
    require_weights,
)
from resfuse.kernels.fusion.layers.launch_signature import is_unseen, signature_of
from resfuse.kernels.fusion.layers.layer_calls import (
    autocast,
    finish,
    finish_by_layers,
    is_followed,
    is_like,
    is_on_gpu,
    is_watched_or_cast,
    settings,
)
from resfuse.kernels.fusion.matching.layer_kinds import geometry_of
from resfuse.kernels.fusion.matching.match import Chain
from resfuse.kernels.fusion.tracing.memory_formats import (
    convolves_to_channels_last,
    is_ambiguous,
    laid_out,
    strides_in,
    suggests_channels_last,
)
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.ops.conv_problem import Epilogue

Shape = tuple[int, int, int, int]
_MOST_KINDS = 16  # of inputs of a layer, for which strides are kept


class _Accepted(NamedTuple):
    """An input that has passed all checks of a convolution on a CPU, and what ran then."""

    packed: Packed
    run: Callable[..., Tensor]
    shape: torch.Size
    x_strides: tuple[int, ...]
    dtype: torch.dtype
    residual_strides: tuple[int, ...] | None
    settings: tuple[Any, ...]
    strides: tuple[int, ...] | None  # that the result is given


class ConvStep:
    """act(bn(conv(x)) + residual), or act(bn(conv(x))) + residual."""

    def __init__(self, chain: Chain, fold: Fold, fast_path: FastPath) -> None:
        assert chain.conv is not None
        self.chain = chain.summary()
        self.name, self.conv, self.norm, self.act = chain.name, chain.conv, chain.norm, chain.act
        self.activation, self.residual = chain.activation, chain.residual
        self.keeps_dtype, self.norm_activates = chain.keeps_dtype, chain.norm_activates
        self.acts_in_place = chain.acts_in_place
        self.adds_to = chain.adds_to
        self.geometry = geometry_of(self.conv)
        self.epilogue = Epilogue(chain.activation, chain.residual)
        layers = (self.conv, self.norm, self.act)
        self.sources = [s for layer in layers if layer is not None for s in sources_of(layer)]
        self.fold, self.fast_path = fold, fast_path
        self.overwrite = False  # no other code holds the residual: it may be added in place
        self._id = object()  # among steps that share a fold
        self.bound: Packed | None = None  # what `unchecked` runs on, once there is that
        # The last input that passed all checks; replaced at once, since other threads read it.
        self._accepted: _Accepted | None = None
        # Of results whose strides no rule says, by what they depend on.
        self._eager_strides: dict[Any, tuple[int, ...]] = {}
        # Of the last input and of its result; replaced at once, since other threads read them.
        self._shapes: tuple[torch.Size | None, Shape] = (None, (0, 0, 0, 0))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.compiler.is_exporting():
            return self._exported(x, residual)
        x = autocast(x)
        if is_on_gpu(x) and is_unseen(x, residual) and (made := self.fold.made) is not None:
            prepared = made.launches.get((self._id, *signature_of(x, residual)))
            y: Tensor | None = None if prepared is None else prepared(x, residual)
            if y is not None:
                return y
        if not self.takes(x, residual) or (x.is_cpu and is_followed(x, residual)):
            self.missed(Miss.REFUSED_INPUT)
            return self.by_layers(x, residual)
        folded = self.folded(x.dtype)
        if folded is None or not folded.finite:
            self.missed(Miss.NOT_FOLDED)
            return self.by_layers(x, residual)
        if x.is_cuda:
            return self._on_gpu(x, self.folded_for_gpu(x.dtype), residual)
        if folded.packed is None and x.is_cpu:
            folded = folded.pack(self.geometry, self.activation, x, self.fold)
            self.fold.made = folded
        if folded.packed is not None:
            self._discard_weight()
            return self._packed(x, folded.packed, residual)
        self.missed(Miss.NOT_PACKED)
        return self._decomposed(x, folded, residual)

    def missed(self, miss: Miss) -> None:
        """Reports that this run did what `unchecked` would not do."""
        self.fast_path.report(self.name, miss)

    def unchecked(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Runs on a CPU without the checks, once the layer is bound to packed weights.

        Until then, and from the moment on that another thread forgets what was folded, it is the
        checked run.
        """
        return self(x, residual)

    def with_eager_strides(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the result with the strides that eager's layers would have given it."""
        kept = self._accepted
        if kept is not None and self._repeats(kept, x, residual):
            y = kept.run(x) if residual is None else kept.run(x, residual)
            if kept.strides is None:
                return y
            self.missed(Miss.EAGER_STRIDES)
            return y.as_strided(y.shape, kept.strides)
        if torch.compiler.is_exporting() or not self.takes(autocast(x), residual):
            return self(x, residual)
        channels_last = convolves_to_channels_last(autocast(x), self.conv.weight)
        shape = self._output_shape(x)
        odd = residual is not None and (
            residual.shape != shape or residual.stride() != strides_in(shape, channels_last)
        )
        ambiguous = channels_last and is_ambiguous(shape)
        keeps_weight = not self.fold.discard  # eager's layers may be asked again
        if ambiguous and residual is None and x.is_cpu and keeps_weight:
            return self._with_ambiguous_strides(x)
        if odd or ambiguous:
            self.missed(Miss.EAGER_STRIDES)
            return self.by_layers(x, residual)
        before = self.fast_path.last_miss
        made = self(x, residual)
        y = laid_out(made, channels_last)
        if y is not made:
            self.missed(Miss.CONVERTED)
        elif self.fast_path.last_miss is before:
            self._accept(x, residual, None)
        return y

    def _accept(self, x: Tensor, residual: Tensor | None, strides: tuple[int, ...] | None) -> None:
        """Notes that an input has passed all checks: what is like it needs none."""
        made, run = self.fold.made, vars(self).get("unchecked")
        adds = self.residual != "none"
        if made is None or made.packed is None or made.packed is not self.bound or run is None:
            return
        if is_watched_or_cast() or (residual is not None) != adds:
            return
        beside = None if residual is None else residual.stride()
        self._accepted = _Accepted(
            made.packed, run, x.shape, x.stride(), x.dtype, beside, settings(), strides
        )

    def _repeats(self, kept: "_Accepted", x: Tensor, residual: Tensor | None) -> bool:
        """Whether an input, on weights that are those of then, is like one that passed all checks.

        Where a forward reads other values than those of fused layers (fast_path.py), each layer
        compares its own input.
        """
        made = self.fold.made
        if made is None or made.packed is not kept.packed or is_watched_or_cast():
            return False
        if not is_like(x, kept.shape, kept.x_strides, kept.dtype) or kept.settings != settings():
            return False
        if residual is None or kept.residual_strides is None:
            return residual is None and kept.residual_strides is None
        return is_like(residual, self._output_shape(x), kept.residual_strides, kept.dtype)

    def _with_ambiguous_strides(self, x: Tensor) -> Tensor:
        """Returns a result of one pixel, or of one channel: all layouts are the same memory, and
        which strides eager's layers give it they are asked once for each kind of input. The
        convolutions of a squeeze-and-excitation are such.
        """
        self.missed(Miss.EAGER_STRIDES)
        weight = self.conv.weight
        kind = x.shape, x.stride(), x.dtype, x.device, weight.stride(), weight.dtype, settings()
        strides = self._eager_strides.get(kind)
        if strides is None:
            y = self.by_layers(x, None)
            if len(self._eager_strides) >= _MOST_KINDS:
                self._eager_strides.clear()
            if y.is_contiguous():
                self._eager_strides[kind] = y.stride()
            return y
        y = self(x)
        if not y.is_contiguous():
            return self.by_layers(x, None)
        if not torch.compiler.is_compiling():
            self._accept(x, None, strides)
        return y.as_strided(y.shape, strides)

    def makes_channels_last(self, x: Tensor) -> bool:
        """Whether eager's result for x is channels_last, and nothing else."""
        return (
            self.takes(x)
            and convolves_to_channels_last(x, self.conv.weight)
            and not is_ambiguous(self._output_shape(x))
        )

    def by_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Calls the original modules."""
        require_weights(self.fold.discarded)
        y = self.conv(x)
        if self.norm is not None:
            y = self.norm(y)
        return finish_by_layers(self, y, residual)

    def folded(self, dtype: torch.dtype) -> Folded | None:
        """Returns the layers folded in that dtype, or None where they cannot be folded.

        `forget_if_stale` has made sure that what is kept is fresh.
        """
        folded = self.fold.made  # which another thread may replace at any moment
        if folded is None or (folded.dtype != dtype and not self.fold.discarded):
            folded = fold(self.sources, self.conv, self.norm, self.act, dtype)
            self.fold.made = folded
        return folded

    def folded_for_gpu(self, dtype: torch.dtype) -> Folded:
        """Returns the folded layers for a run on a GPU, laid out as kernels read them."""
        folded = self.folded(dtype)
        assert folded is not None
        if torch.compiler.is_compiling():  # a graph cannot take a layer's weight away
            return folded
        self._discard_weight()
        return folded

    def forget_if_stale(self) -> None:
        """Forgets what was folded from tensors that have changed.

        Raises:
            RuntimeError: they have, and the weight that it takes to fold again was discarded.
        """
        made = self.fold.made
        if made is None:
            return
        if made.origin.is_where_it_was(tensors_of(self.sources)) and made.origin.is_unchanged():
            return
        require_weights(self.fold.discarded)
        self.fold.made = None

    def is_readable(self) -> bool:
        """Whether all that was folded lies where every byte of it can be looked at."""
        return self.fold.made is None or self.fold.made.origin.is_readable

    def ask_for(self, asked: Asked) -> None:
        """Sets what the layer computes in; what was folded for something else is forgotten."""
        if asked != self.fold.asked:
            self.fold.asked = asked
            self.forget()

    def forget(self) -> None:
        """Forgets what was folded, and how it was run."""
        if not self.fold.discarded:
            self.fold.made = self.bound = None
            vars(self).pop("unchecked", None)

    def _discard_weight(self) -> None:
        """Frees the memory of the layer's weight, once, where fuse was asked to; its shape stays.

        fuse may have been asked to long after the weight was folded.
        """
        if not self.fold.discard or self.fold.discarded:
            return
        made, weight = self.fold.made, self.conv._parameters["weight"]
        assert made is not None and weight is not None
        self.conv._parameters["weight"] = nn.Parameter(weight.detach().to("meta"), False)
        self.conv.register_state_dict_pre_hook(_refuse)
        self.conv.register_load_state_dict_pre_hook(_refuse)
        self.fold.made = replace(made, origin=Origin(tensors_of(self.sources)))
        self.fold.discarded = True

    def takes(self, x: Tensor, residual: Tensor | None = None) -> bool:
        """Whether the layers' own checks would pass: then none of them is asked."""
        weight = self.conv._parameters.get("weight")
        return (
            type(weight) is nn.Parameter
            and is_plain(x)
            and (residual is None or is_plain(residual))
            and x.dim() == 4
            and x.size(1) == self.conv.in_channels
            and (x.device == weight.device or self.fold.discarded)
            and (x.dtype == weight.dtype or torch._C._is_any_autocast_enabled())
            and x.numel() > 0
            and (residual is None or residual.dtype == x.dtype)
        )

    def _packed(self, x: Tensor, packed: Packed, residual: Tensor | None) -> Tensor:
        # The fast path is for calls without autocast alone, and other threads may be under it.
        if packed is not self.bound and not torch._C._is_any_autocast_enabled():
            adds = self.residual != "none"
            run = packed.bound_add(self.overwrite) if adds else packed.bound()
            vars(self)["unchecked"] = run
            self.bound = packed
        if residual is None:
            return packed(x)
        if self.residual == "after":
            self.missed(Miss.RESIDUAL_AFTER_ACTIVATION)
            return packed(x).add_(residual)
        shape = self._output_shape(x)
        in_nhwc = residual.is_contiguous(memory_format=torch.channels_last)
        if residual.shape != shape or (self.overwrite and not in_nhwc):
            self.missed(Miss.RESIDUAL_EXPANDED)
            return packed.add(x, residual.expand(shape))
        return packed.add(x, residual, self.overwrite)

    def _on_gpu(self, x: Tensor, folded: Folded, residual: Tensor | None) -> Tensor:
        """By a kernel: as an op where torch looks on, else launched, and prepared for the next."""
        from resfuse.kernels.fusion.layers.prepared_launch import launched
        from resfuse.kernels.gpu.dispatch import conv_bn_act, launch_of

        if residual is not None and residual.shape != self._output_shape(x):
            return self._decomposed(x, folded, residual)
        description = folded.slope, self.geometry, self.epilogue
        if not is_unseen(x, residual):
            return conv_bn_act(x, folded.dense(), folded.bias, residual, *description)
        x, residual = channels_last(x), None if residual is None else channels_last(residual)
        return launched(
            folded.launches,
            (self._id, *signature_of(x, residual)),
            x,
            residual,
            lambda: launch_of(x, folded.dense(), folded.bias, residual, *description),
        )

    def _exported(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Plain ops on the folded weight, which becomes a constant of the exported graph."""
        folded = self.fold.made
        fresh = folded is not None and (self.fold.discarded or folded.is_fresh())
        # Weights that are packed in bfloat16 are rounded: a graph computes in float32.
        rounded = self.fold.asked == "bf16" and not self.fold.discarded
        if folded is None or folded.dtype != x.dtype or not fresh or rounded:
            return self.by_layers(x, residual)
        weight = folded.dense()
        if not suggests_channels_last(self.conv.weight):  # formats go by the weight's
            weight = weight.contiguous()
        return self._decomposed(x, replace(folded, weight=weight), residual)

    def _decomposed(self, x: Tensor, folded: Folded, residual: Tensor | None) -> Tensor:
        """Convolution, add and activation in torch's own ops."""
        y = F.conv2d(x, folded.dense(), folded.bias, *self.geometry)
        return finish(y, residual, self.residual, self.activation, folded.slope)

    def _output_shape(self, x: Tensor) -> Shape:
        shapes = self._shapes
        if x.shape != shapes[0]:
            conv = self.conv
            weight = (conv.out_channels, conv.in_channels, *conv.kernel_size)
            shapes = self._shapes = (x.shape, self.geometry.output_shape(x.shape, weight))
        return shapes[1]


def _refuse(*_: Any) -> None:
    """Refuses to save or load a layer whose weight was discarded."""
    require_weights(True)
