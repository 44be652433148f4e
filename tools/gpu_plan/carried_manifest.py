"""What carried kernels were made for and from, and whether that is what is here.

Triton knows a kernel by its source with line numbers, its own files, ptxas's version, options and
some environment variables. Where one of those is another, its cache does not know the kernel, and
compiles it: nothing wrong can come of kernels that do not fit.
"""

import hashlib
import json
import platform
import sysconfig
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch

from resfuse.bench.common.errors import UsageError
from resfuse.resnet_ref import MODELS

DTYPES = ("float16", "bfloat16", "float32", "int8")


@dataclass(frozen=True)
class Wanted:
    """A network in inference, whose kernels are wanted; with "int8" those of its engine in int8."""

    model: str
    batch_size: int
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `resnet50:256:float16`.

        Raises:
            UsageError: it is not of that form, or names what there is not.
        """
        model, _, rest = text.partition(":")
        batch_size, _, dtype = rest.partition(":")
        if not batch_size.isdecimal() or int(batch_size) < 1:
            raise UsageError(f"{text!r} is not of the form resnet50:256:float16")
        if model not in MODELS:
            raise UsageError(f"{text!r}: there is no network {model!r}; `resfuse list` has them")
        if dtype not in DTYPES:
            raise UsageError(f"{text!r}: dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
        return cls(model, int(batch_size), dtype)

    def __str__(self) -> str:
        return f"{self.model}:{self.batch_size}:{self.dtype}"


@dataclass(frozen=True)
class Facts:
    """All that Triton's keys depend on, and what launchers are built against.

    sources: SHA-256 of our kernels' files.
    triton_key: SHA-256 of what Triton's keys have of Triton itself.
    ptxas: what it says of its version.
    python: minor version, implementation and machine, as its extensions are named.
    arch: ten times the compute capability.
    variables: those of the environment that change what Triton compiles.
    """

    sources: str
    triton: str
    triton_key: str
    ptxas: str
    python: str
    torch: str
    arch: int
    variables: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Beside the kernels in their archive."""

    commit: str
    covers: list[str]
    kernels: int
    launchers: int
    facts: Facts

    def dumps(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def loads(cls, text: str) -> Self:
        """Raises ValueError where it is none."""
        try:
            told = json.loads(text)
            facts = Facts(**{name.name: told["facts"][name.name] for name in fields(Facts)})
            return cls(
                str(told["commit"]),
                [str(one) for one in told["covers"]],
                int(told["kernels"]),
                int(told["launchers"]),
                facts,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no manifest: {error}") from None


def facts_here(arch: int, ptxas: str | None = None) -> Facts:
    """Returns the facts of this process.

    Args:
        ptxas: what the one says that will be used here; by default the one that Triton takes now.
    """
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return Facts(
        sources=sources_digest(),
        triton=triton.__version__,
        triton_key=hashlib.sha256(triton_key().encode()).hexdigest(),
        ptxas=get_ptxas_version(arch) if ptxas is None else ptxas,
        python=f"{platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]} "
        f"{sysconfig.get_config_var('EXT_SUFFIX')}",
        torch=str(torch.__version__),
        arch=arch,
        variables=dict(get_cache_invalidating_env_vars()),
    )


def sources_digest() -> str:
    """Returns the digest of the files of our kernels, engine included."""
    import resfuse.kernels

    root = Path(resfuse.kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def differences(made: Manifest, here: Facts, commit: str) -> list[str]:
    """Lists what differs here from where the kernels were made, in a few words each."""
    there = made.facts
    told = []
    if there.sources != here.sources:
        told.append(f"made from other sources, {made.commit}, here {commit}")
    if there.triton != here.triton:
        told.append(f"by triton {there.triton}, here {here.triton}")
    elif there.triton_key != here.triton_key:
        told.append(f"by another build of triton {there.triton}")
    if there.ptxas != here.ptxas:
        told.append(f"by ptxas {_version(there.ptxas)}, here {_version(here.ptxas)}")
    if there.python != here.python:
        told.append(f"for Python {there.python}, here {here.python}")
    if there.arch != here.arch:
        told.append(f"for sm_{there.arch}, here sm_{here.arch}")
    for name in sorted({*there.variables, *here.variables}):
        values = [one.get(name, "not set") for one in (there.variables, here.variables)]
        if values[0] != values[1]:
            told.append(f"with {name} {values[0]}, here {values[1]}")
    return told


def _version(said: Any) -> str:
    """`V13.3.73` of what ptxas says; all of it where there is no such word."""
    words = [word for word in str(said).split() if word[:1] == "V" and word[1:2].isdigit()]
    return words[0] if words else repr(str(said))
