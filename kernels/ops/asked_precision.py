"""Precision: what a user asks a model to be computed in, and which layers are kept in float32."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

PRECISIONS = ("fp32", "bf16")  # that need nothing but a model; the engine's int8 needs ranges
_COMPUTED = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """What is computed inside a model.

    Attributes:
        name: one of PRECISIONS, "int8", or None for that of the model.
        keep: patterns of names of modules and parameters, as fnmatch has them; convolutions and
            linear layers that they match are computed in float32.
    """

    name: str | None = None
    keep: tuple[str, ...] = ()

    @classmethod
    def asked(
        cls, name: str | None, keep: Sequence[str], known: Sequence[str] = PRECISIONS
    ) -> "Precision":
        """Returns the precision of a function's arguments `precision` and `keep`.

        Args:
            known: the precisions that the function has.

        Raises:
            ValueError: the name is unknown, or the patterns are no list of them, or are given
                without a precision that some layers may not have.
        """
        if isinstance(keep, str) or not all(isinstance(pattern, str) for pattern in keep):
            raise ValueError(f"argument keep: {keep!r}; accepted: a list of patterns")
        if name not in (None, *known):
            raise ValueError(f"argument precision: {name!r}; accepted: {', '.join(known)}")
        narrow = [f"precision={other!r}" for other in known if other != "fp32"]
        if keep and name in (None, "fp32"):
            raise ValueError(
                f"argument keep: given without {' or '.join(narrow)}; accepted: with "
                f"{'it' if len(narrow) == 1 else 'one of them'}"
            )
        return cls(name, tuple(keep))

    def require_fit(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError unless a model can be computed in this precision.

        Args:
            dtype: of what the model takes.
            device: that it is on.
        """
        fp32 = (torch.float32,)
        taken = {"fp32": fp32, "bf16": _COMPUTED, "int8": fp32}
        own = taken.get(self.name or "", (dtype,))
        if dtype not in own:
            takes = " or ".join(map(str, own))
            raise ValueError(
                f"argument precision: {self.name!r} of a model that takes {dtype}; "
                f"accepted: with models that take {takes}"
            )
        if self.name not in ("bf16", "int8"):
            return
        if device.type != "cpu" and (self.name, device.type) != ("int8", "cuda"):
            instead = "; on a GPU convert the model and its inputs: model.bfloat16()"
            raise ValueError(
                f"argument precision: {self.name!r} is for models on a CPU"
                f"{' or an NVIDIA GPU' * (self.name == 'int8')}"
                f"{instead * (self.name == 'bf16')}"
            )
        if self.keep and dtype == torch.bfloat16:
            raise ValueError(
                "argument keep: the model is in bfloat16 itself; accepted: with a float32 one"
            )
        named = [*model.named_parameters(), *model.named_buffers()]
        wide = next((name for name, t in named if t.dtype == torch.float64), None)
        if wide is not None:
            raise ValueError(
                f"argument model: {wide} is torch.float64; precision={self.name!r} accepts weights "
                "in float32 and bfloat16"
            )

    def kept(self, layers: Collection[str]) -> set[str]:
        """Returns those of the weights of convolutions and linear layers that are kept in float32.

        Args:
            layers: the names of the weights.

        Raises:
            ValueError: a pattern matches none of them.
        """
        for pattern in self.keep:
            if not any(_matches(pattern, layer) for layer in layers):
                some = ", ".join(map(layer_name, list(layers)[:4]))
                more = ", ..." * (len(layers) > 4)
                raise ValueError(
                    f"argument keep: {pattern!r} matches no convolution or linear layer; accepted: "
                    f"names of modules or parameters such as {some}{more}"
                )
        return {layer for layer in layers if any(_matches(p, layer) for p in self.keep)}


def layer_name(weight: str) -> str:
    """Returns the name of the layer that a weight belongs to, or that of the parameter from which
    the weight is computed, without the hash of how ("conv1.weight:0c630406a344")."""
    return weight.partition(":")[0].removesuffix(".weight")


def _matches(pattern: str, weight: str) -> bool:
    """Returns whether a pattern matches a parameter, its module or one around it; of weights that
    are computed, the parameter that they are computed from."""
    parts = weight.partition(":")[0].split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in names)
