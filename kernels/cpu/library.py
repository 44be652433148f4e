"""Compiles and loads the shared library of native steps: for this processor, at first use, cached
on disk.

Like torch.compile and Triton, this needs a compiler where it runs; callers have a fallback where
there is none. The file's name is a hash of everything that it is compiled from, and it is renamed
into place when it is complete. Of several processes that need it at once one compiles it and the
others wait, where the file system has locks; where it has none, all compile it.

There is a library for each type that values are stored in: for float32, and for bfloat16 and for
uint8 one more each of the same sources, compiled where a network in that precision is built first.
So float32 pays nothing for them, neither seconds nor a branch.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

Storage = Literal["fp32", "bf16", "u8"]
ISA_VARIABLE = "RESFUSE_CPU_ISA"
_ISAS = {"bf16": ("bf16", "fp32"), "u8": ("vnni", "avx2", "portable")}  # the names it accepts

# Not -ffast-math: NaN and infinity must come out as torch has them. What is fused is said in
# the sources (vectors.h).
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
_COMPILERS = ("g++", "c++", "clang++")


class NativeUnavailable(RuntimeError):
    """There are no native steps on this machine; the message says why in one sentence."""


@functools.cache
def library(architecture: str = "native", *further: str) -> ctypes.CDLL:
    """Returns the library, compiled if need be (about 15 s).

    Args:
        architecture: a value of the compiler's -march; tests compile for other vector widths.
        further: more flags for the compiler, for tests.

    Raises:
        NativeUnavailable: there is no compiler, it fails, or the processor has no vectors.
    """
    compiler = _compiler()
    flags = (*_flags(architecture), *further)
    built = cache_folder() / "native" / f"{_key(compiler, flags)}.so"
    if not built.exists():
        _compile(compiler, flags, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise NativeUnavailable(f"the native library cannot be loaded: {error}") from None


def library_for(storage: Storage) -> ctypes.CDLL:
    """Returns the library for values stored in float32, bfloat16 or uint8.

    Raises:
        NativeUnavailable: as `library` does.
        ValueError: $RESFUSE_CPU_ISA has an unknown value, or one that is not for this processor.
    """
    return library() if storage == "fp32" else library("native", *_FLAGS_OF[storage]())


def bf16_isa() -> str:
    """Returns by which instructions bfloat16 is multiplied: "bf16" (AVX512-BF16's dot products of
    pairs) or, where there are none, "fp32". $RESFUSE_CPU_ISA chooses one of them.

    Raises:
        ValueError: as `library_for` does.
    """
    able, asked = "avx512_bf16" in processor().split(), _asked_isa("bf16")
    if asked == "bf16" and not able:
        raise ValueError(f"{ISA_VARIABLE}: 'bf16'; this processor has no AVX512-BF16")
    return asked or ("bf16" if able else "fp32")


def int8_isa() -> str:
    """Returns by which instructions uint8 is multiplied by int8: "vnni" (dot products of four, of
    AVX-512, AVX or ARM's I8MM), "avx2" (pairs of 16 bits) or "portable"; all give the same bits.
    $RESFUSE_CPU_ISA chooses one of them.

    Raises:
        ValueError: as `library_for` does.
    """
    there = set(processor().replace(":", " ").split())
    able = {"vnni": {"avx512_vnni", "avx_vnni", "i8mm"} & there, "avx2": {"avx2"} & there}
    asked = _asked_isa("u8")
    if asked in able and not able[asked]:
        raise ValueError(f"{ISA_VARIABLE}: {asked!r}; this processor has no {asked.upper()}")
    return asked or next((isa for isa, found in able.items() if found), "portable")


def _asked_isa(storage: Storage) -> str | None:
    """Returns which instructions for a storage $RESFUSE_CPU_ISA asks for: a name, or one for
    bfloat16 and one for uint8 with a comma between them."""
    asked = os.environ.get(ISA_VARIABLE, "")
    names = [name.strip() for name in asked.split(",")] if asked else []
    accepted = ", ".join(name for names in _ISAS.values() for name in names)
    for isas in _ISAS.values():
        if len(both := [name for name in names if name in isas]) > 1:
            raise ValueError(f"{ISA_VARIABLE}: {asked!r}; accepted: one of {', '.join(both)}")
    if any(name not in accepted.split(", ") for name in names):
        raise ValueError(f"{ISA_VARIABLE}: {asked!r}; accepted: {accepted}")
    return next((name for name in names if name in _ISAS[storage]), None)


def _bf16_flags() -> tuple[str, ...]:
    return "-DRESFUSE_BF16", *(["-DRESFUSE_NO_BF16_DOT"] if bf16_isa() == "fp32" else [])


def _u8_flags() -> tuple[str, ...]:
    flags = {"vnni": (), "avx2": ("-DRESFUSE_NO_VNNI",), "portable": ("-DRESFUSE_PORTABLE_U8",)}
    return "-DRESFUSE_U8", *flags[int8_isa()]


_FLAGS_OF = {"bf16": _bf16_flags, "u8": _u8_flags}


def constant(name: str) -> int:
    """Returns a constant of the C++ sources that exports.h lists, the same in every library.

    Raises:
        NativeUnavailable: there is no library.
    """
    return _constants(library())[name]


def require_layout(struct: type[ctypes.Structure], name: str) -> None:
    """Raises NativeUnavailable unless the library lays struct `name` out as Python does: the same
    fields at the same offsets.
    """
    known = _constants(library())  # the other library's sources are the same
    theirs = {key: value for key, value in known.items() if key.partition(".")[0] == name}
    ours = {f"{name}.{field[0]}": getattr(struct, field[0]).offset for field in struct._fields_}
    if ours | {name: ctypes.sizeof(struct)} != theirs:
        raise NativeUnavailable(f"the library lays {name} out otherwise on this platform")


class _Constant(ctypes.Structure):
    """The fields of `struct Constant` in exports.h, in its order."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_long)]


@functools.cache
def _constants(lib: ctypes.CDLL) -> dict[str, int]:
    """Returns all constants in exports.h; the table ends with an entry without a name."""
    table = lib.resfuse_constants
    table.restype = ctypes.POINTER(_Constant)
    entries = takewhile(lambda entry: entry.name, map(table().__getitem__, count()))
    return {entry.name.decode(): entry.value for entry in entries}


def cache_folder() -> Path:
    """Returns the folder of caches: $RESFUSE_CACHE_DIR, or resfuse/ in the user's cache folder."""
    own = os.environ.get("RESFUSE_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "resfuse"


def fingerprint() -> str:
    """Returns a hash of the libraries' sources, flags, compiler and processor, "none" without a
    compiler."""
    try:
        return _key(_compiler(), _flags("native"))
    except NativeUnavailable:
        return "none"


def why_unavailable(storage: Storage = "fp32") -> str | None:
    """Returns the reason why there is no library here, None where there is one."""
    try:
        library_for(storage)
    except NativeUnavailable as reason:
        return str(reason)
    return None


_SOURCES = Path(__file__).with_name("src")


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else _COMPILERS:
        if (path := shutil.which(name)) is not None:
            return path
    sought = f"$CXX is {named!r}, which" if named else f"none of {', '.join(_COMPILERS)}"
    raise NativeUnavailable(f"no C++ compiler: {sought} is on the path")


def _flags(architecture: str) -> tuple[str, ...]:
    return (*_FLAGS, f"-march={architecture}")


def _sources() -> list[Path]:
    return sorted(p for p in _SOURCES.rglob("*") if p.suffix in (".h", ".cpp"))


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.read_bytes())
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    except OSError as error:
        raise NativeUnavailable(f"{compiler} cannot be run: {error}") from None
    digest.update(version + " ".join((*flags, processor())).encode())
    return digest.hexdigest()[:20]


@functools.cache
def processor() -> str:
    """Returns the lines of /proc/cpuinfo that -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    prefixes = (
        "vendor_id",
        "model name",
        "cpu family",
        "model",
        "stepping",
        "flags",
        "Features",
        "CPU part",
    )
    return "\n".join(sorted({line for line in lines if line.startswith(prefixes)}))


def _compile(compiler: str, flags: tuple[str, ...], built: Path) -> None:
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with _locked(built.with_suffix(".lock")):
            if built.exists():
                return
            _compile_alone(compiler, flags, built)
    except OSError as error:
        raise NativeUnavailable(f"the native library cannot be made: {error}") from None


def _compile_alone(compiler: str, flags: tuple[str, ...], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        output = Path(folder) / built.name
        source = str(_SOURCES / "steps.cpp")
        command = [compiler, *flags, source, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = _first_error(done.stderr)
            raise NativeUnavailable(f"{compiler} cannot compile the native steps: {said}")
        output.replace(built)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lets one process at a time in, and removes the file of the lock."""
    with file.open("w") as lock:
        with contextlib.suppress(ImportError, OSError):  # a system or file system without locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _first_error(said: str) -> str:
    """Returns the first error that a compiler printed; clang's last line only counts its errors."""
    lines = said.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error:" in line), lines[-1])
