"""The fused layers, or steps, that a rewritten forward calls in place of chains of layers.

Each stands for one chain (match.py), keeps what was folded from its layers, and folds again when
one of their tensors has changed.

x [N, C, H, W], residual [N, K, P, Q] -> y [N, K, P, Q], channels_last. On a GPU a step launches our
kernels; on a CPU a native step, oneDNN's fused convolution, or torch's own on folded weights. What
a step cannot do (another dtype, an empty batch, an image without a batch dimension) its layers do
themselves, so that results and errors stay theirs.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels.cpu.packed_norm import NativeNorm
from resfuse.kernels.cpu.weight_origin import (
    Origin,
    is_plain,
    sources_of,
    tensors_of,
    why_not_followed,
)
from resfuse.kernels.fusion.layers.fast_path import FastPath, Miss
from resfuse.kernels.fusion.layers.fold_cache import (
    Asked,
    Fold,
    Folded,
    Packed,
    fold,
    lacks_statistics,
    require_weights,
)
from resfuse.kernels.fusion.layers.launch_signature import is_unseen, signature_of
from resfuse.kernels.fusion.matching.layer_kinds import geometry_of, slope_of
from resfuse.kernels.fusion.matching.match import Chain, Residual
from resfuse.kernels.fusion.tracing.memory_formats import (
    convolves_to_channels_last,
    is_ambiguous,
    laid_out,
    strides_in,
    suggests_channels_last,
)
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.bn_folding import bn_scale_shift
from resfuse.kernels.ops.conv_problem import Epilogue

Shape = tuple[int, int, int, int]
_MOST_KINDS = 16  # of inputs of a layer, for which strides are kept


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
        if not self.takes(x, residual):
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
        if torch.compiler.is_exporting() or not self.takes(autocast(x), residual):
            return self(x, residual)
        channels_last = convolves_to_channels_last(autocast(x), self.conv.weight)
        shape = self._output_shape(x)
        odd = residual is not None and (
            residual.shape != shape or residual.stride() != strides_in(shape, channels_last)
        )
        ambiguous = channels_last and is_ambiguous(shape)
        if ambiguous and residual is None and x.is_cpu and not torch.compiler.is_compiling():
            return self._with_ambiguous_strides(x)
        if odd or ambiguous:
            self.missed(Miss.EAGER_STRIDES)
            return self.by_layers(x, residual)
        made = self(x, residual)
        y = laid_out(made, channels_last)
        if y is not made:
            self.missed(Miss.CONVERTED)
        return y

    def _with_ambiguous_strides(self, x: Tensor) -> Tensor:
        """Returns a result of one pixel, or of one channel: all layouts are the same memory, and
        which strides eager's layers give it they are asked once for each kind of input.

        The two convolutions of a squeeze-and-excitation run so: on the layers they would take 60 us
        and on native steps they take 20 (two cores).
        """
        self.missed(Miss.EAGER_STRIDES)
        weight = self.conv.weight
        kind = x.shape, x.stride(), x.dtype, x.device, weight.stride(), weight.dtype, _settings()
        strides = self._eager_strides.get(kind)
        if strides is None:
            y = self.by_layers(x, None)
            if len(self._eager_strides) >= _MOST_KINDS:
                self._eager_strides.clear()
            if y.is_contiguous():
                self._eager_strides[kind] = y.stride()
            return y
        y = self(x)
        return (
            y if y.stride() == strides or not y.is_contiguous() else y.as_strided(y.shape, strides)
        )

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
        return _finish_by_layers(self, y, residual)

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
        return _finish(y, residual, self.residual, self.activation, folded.slope)

    def _output_shape(self, x: Tensor) -> Shape:
        shapes = self._shapes
        if x.shape != shapes[0]:
            conv = self.conv
            weight = (conv.out_channels, conv.in_channels, *conv.kernel_size)
            shapes = self._shapes = (x.shape, self.geometry.output_shape(x.shape, weight))
        return shapes[1]


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
        # Scale, shift, and launches prepared with them (prepared_launch.py): replaced at once,
        # since other threads read them.
        self._made: tuple[Origin, Tensor, Tensor, dict[Any, Any]] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._is_native(x, residual):
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
        given = [x] if residual is None else [x, residual]
        if any(each.dtype != torch.float32 or not is_plain(each) for each in given):
            return False
        if x.dim() != 4 or x.numel() == 0 or is_ambiguous(x.shape):
            return False
        if any(each.shape != x.shape for each in given) or torch._C._is_any_autocast_enabled():
            return False
        if any(each.stride() != strides_in(x.shape, True) for each in given):
            return False
        held = self._held()
        if held is None or any(len(each) != x.shape[1] for each in held if each is not None):
            return False
        return NativeNorm.supports(x.shape[1], self.activation)

    def _held(self) -> tuple[Tensor | None, ...] | None:
        """Returns mean, variance, weight and bias, None where a native step cannot read them."""
        norm = self.norm
        if lacks_statistics(norm):
            return None
        held = norm.running_mean, norm.running_var, norm.weight, norm.bias
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
        mean, variance, weight, bias = self._held() or (None,) * 4
        assert mean is not None and variance is not None
        eps = float(self.norm.eps)
        return native(x, residual, (mean, variance), (weight, bias), eps, self.threads)

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
        return _finish_by_layers(self, self.norm(x), residual)


def _refuse(*_: Any) -> None:
    """Refuses to save or load a layer whose weight was discarded."""
    require_weights(True)


def _settings() -> tuple[Any, ...]:
    """Returns what decides, beside the input, which of torch's convolutions eager calls."""
    return torch._C._get_mkldnn_enabled(), torch._C._is_any_autocast_enabled()


def is_on_gpu(x: object) -> bool:
    """False for what is no tensor, which the layers refuse in torch's words."""
    return isinstance(x, Tensor) and x.is_cuda


def autocast(x: Tensor) -> Tensor:
    """Casts a tensor as autocast would for a convolution; differentiable."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return x
    if x.dtype == torch.float64 or not x.is_floating_point():  # which it leaves alone
        return x
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _finish(
    y: Tensor,
    residual: Tensor | None,
    where: Residual,
    activation: str,
    slope: Slope,
    adds_to: bool = False,
) -> Tensor:
    """Residual and activation, in torch's own ops, in the layers' order: strides go by it."""
    if residual is not None and where == "before":
        y = residual + y if adds_to else y + residual
    y = ACTIVATIONS[activation].forward(y, slope)
    if residual is None or where != "after":
        return y
    return residual + y if adds_to else y + residual


def _finish_by_layers(step: "ConvStep | NormStep", y: Tensor, residual: Tensor | None) -> Tensor:
    """Adds and activates after the original norm has run, which may itself activate."""
    activation = "identity" if step.norm_activates else step.activation
    slope = slope_of(step.act, y.shape[1])
    result = _finish(y, residual, step.residual, activation, slope, step.adds_to)
    if step.acts_in_place and residual is None and y.dim() == 4 and is_ambiguous(y.shape):
        result = result.as_strided(result.shape, y.stride())  # which one of its own may not have
    return result.to(y.dtype) if step.keeps_dtype else result
