"""Which ptxas there are on this machine. NVIDIA's assembler decides what Triton's kernels become on
a GPU, and older ones can miscompile them for Hopper (SOUND), so the newest is worth looking for.

    TRITON_PTXAS_PATH is the user's word on it; then what was carried here with compiled kernels
    (resfuse.tools.gpu_plan.carried), the nvidia-cuda-nvcc wheel, CUDA_HOME and the PATH are
    searched, and the ones that Triton carries last.
"""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Older ones can corrupt WGMMA whose A operand sits in registers (triton #9433, #11781).
SOUND = (13, 3)
VARIABLE = "TRITON_PTXAS_PATH"
CARRIED = Path("carried/ptxas")  # in Triton's cache
_TIMEOUT_S = 20
_TRITON = "Triton"


@dataclass(frozen=True)
class Ptxas:
    """One that runs here, and who brought it."""

    path: str
    version: str
    origin: str

    @property
    def sound(self) -> bool:
        return is_sound(self.version)

    def told(self) -> str:
        """In a few words."""
        warning = "" if self.sound else ", which may miscompile for Hopper"
        return f"ptxas {self.version} of {self.origin}{warning}"


def is_sound(version: str) -> bool:
    """Whether a ptxas of that version is free of the bug."""
    return _numbers(version) >= SOUND


def best(found: Sequence[Ptxas], newest_major: int | None = None) -> Ptxas | None:
    """The user's; else the newest sound one, the first of equals; else Triton's own.

    Args:
        newest_major: of CUDA, as the driver knows it: it may not load what a later one assembles.
    """
    usable = [p for p in found if newest_major is None or _numbers(p.version)[0] <= newest_major]
    named = [p for p in found if p.origin == VARIABLE]
    newest = max((p for p in usable if p.sound), key=lambda p: _numbers(p.version), default=None)
    own = [p for p in found if p.origin == _TRITON]
    return next(iter(named), None) or newest or next(iter(own), None)


def find(environment: Mapping[str, str] = os.environ) -> list[Ptxas]:
    """Every ptxas that runs, in the order in which they are searched for.

    Raises:
        ValueError: TRITON_PTXAS_PATH names none that runs.
    """
    found: list[Ptxas] = []
    for origin, path in _places(environment):
        version = version_of(path)
        if version is not None:
            found.append(Ptxas(str(path), version, origin))
        elif origin == VARIABLE:
            raise ValueError(f"{VARIABLE}: {path} is no ptxas that runs")
    return found


def in_use(environment: Mapping[str, str] = os.environ) -> Ptxas | None:
    """The one that Triton takes; None where that does not run."""
    places = list(_places({name: v for name, v in environment.items() if name != VARIABLE}))
    own = next((path for origin, path in places if origin == _TRITON), None)
    path = Path(environment[VARIABLE]) if environment.get(VARIABLE) else own
    version = version_of(path) if path is not None else None
    if path is None or version is None:
        return None
    return Ptxas(str(path), version, next((o for o, p in places if p == path), VARIABLE))


def sound_path() -> str | None:
    """Of the best one here that TRITON_PTXAS_PATH does not name, if it is sound."""
    found = best(find({name: v for name, v in os.environ.items() if name != VARIABLE}))
    return found.path if found is not None and found.sound else None


def version_of(path: Path | str) -> str | None:
    """What it says of itself, `12.9.86`; None where it does not run."""
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    words = (word.strip(",").removeprefix("V") for word in said.split() if word[:1] == "V")
    return next((word for word in words if _numbers(word)), None)


def _places(environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    if named := environment.get(VARIABLE):
        yield VARIABLE, Path(named)
    cache = environment.get("TRITON_CACHE_DIR")
    carried = (Path(cache) if cache else Path.home() / ".triton" / "cache") / CARRIED
    if carried.exists():
        yield "the carried kernels", carried
    for folder in _folders_of("nvidia"):
        for path in sorted(folder.glob("*/bin/ptxas")):
            yield f"the wheel in nvidia/{path.parts[-3]}", path
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(variable):
            yield variable, Path(home) / "bin/ptxas"
    if (on_path := shutil.which("ptxas", path=environment.get("PATH", ""))) is not None:
        yield "the PATH", Path(on_path)
    for folder in _folders_of("triton"):
        for name in ("ptxas", "ptxas-blackwell"):
            yield _TRITON, folder / "backends/nvidia/bin" / name


def _folders_of(package: str) -> list[Path]:
    """Where it is installed, without importing it."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place) for place in places or []]


def _numbers(version: str) -> tuple[int, ...]:
    """() for what is no version."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()
