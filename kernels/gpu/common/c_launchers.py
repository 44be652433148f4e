"""The C launchers of Triton 3.6: one Python extension for each signature of a kernel, which Triton
writes and has gcc compile (0.3 s) at the first launch, in the process that measures. Built ahead
here, under Triton's own key, so that the first launch finds them. Triton 3.8 has one launcher for
all signatures, which comes with its driver.
"""

import contextlib
import hashlib
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

# The extensions' names, in nvidia.CudaLauncher and nvidia.CudaUtils.
_NAME = "__triton_launcher"
_DRIVER = "cuda_utils"


def source_of(src: Any, metadata: Any) -> str | None:
    """The C source of a compiled kernel's launcher; None where Triton has one for all.

    Args:
        src: the triton.compiler.ASTSource it was compiled from.
        metadata: of the triton.CompiledKernel.
    """
    if not hasattr(nvidia, "make_launcher"):
        return None
    # as nvidia.CudaLauncher has it
    constants = {
        (src.fn.arg_names.index(key),) if isinstance(key, str) else key: value
        for key, value in src.constants.items()
    }
    described = getattr(metadata, "tensordesc_meta", None)
    return nvidia.make_launcher(constants, dict(src.signature.items()), described)


def is_built(source: str) -> bool:
    """Whether Triton would find it in its cache."""
    return cached(source) is not None


def cached(source: str) -> Path | None:
    """The extension in Triton's cache."""
    found = get_cache_manager(_key(source)).get_file(_file(_NAME))
    return None if found is None else Path(found)


def cached_driver() -> Path | None:
    """The extension that is Triton's own driver, if `build_driver_ahead` could make it."""
    if not hasattr(nvidia, "make_launcher"):
        return None
    found = get_cache_manager(_key(_driver_source())).get_file(_file(_DRIVER))
    return None if found is None else Path(found)


def build_ahead(source: str) -> bool:
    """Compiles a launcher into Triton's cache; returns False where it is there already.

    Raises:
        RuntimeError: there is no C compiler.
        subprocess.CalledProcessError: the compiler failed.
    """
    return _build(_NAME, source)


def build_driver_ahead() -> bool:
    """The same for the extension that is Triton's own driver, where the key is its source alone:
    with one launcher for all, the key has the folders of this machine in it, and False comes back.
    """
    if not hasattr(nvidia, "make_launcher"):
        return False
    return _build(_DRIVER, _driver_source())


def _driver_source() -> str:
    return Path(nvidia.dirname, "driver.c").read_text()


def _build(name: str, source: str) -> bool:
    cache = get_cache_manager(_key(source))
    if cache.get_file(_file(name)) is not None:
        return False
    with tempfile.TemporaryDirectory() as folder, _folders_of_libcuda() as libraries:
        path = Path(folder, f"{name}.c")
        path.write_text(source)
        library = build._build(
            name, str(path), folder, libraries, nvidia.include_dirs, nvidia.libraries, []
        )
        cache.put(Path(library).read_bytes(), _file(name), binary=True)
    return True


def _key(source: str) -> str:
    """Of build.compile_module_from_src."""
    return hashlib.sha256((source + build.platform_key()).encode()).hexdigest()


def _file(name: str) -> str:
    return f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


@contextlib.contextmanager
def _folders_of_libcuda() -> Iterator[list[str]]:
    """Where the linker finds libcuda.so.1: without a driver, an empty one stands in for it. Nothing
    of it but its name gets into what is linked."""
    try:
        yield nvidia.library_dirs()
        return
    except (AssertionError, OSError, subprocess.SubprocessError):
        pass  # no driver
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/libcuda.so.1"
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"]
        subprocess.run([*command, "-o", library], check=True, capture_output=True)
        yield [nvidia.libdevice_dir, folder]
