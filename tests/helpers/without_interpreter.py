"""Runs a function of a test file in a process of its own that compiles kernels, as a process with
a GPU does: in the tests' own, without a GPU, Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path


def printed_by(module: str, function: str, cache: Path, **environment: str) -> str:
    """What `module.function()` prints, with Triton's cache in the folder `cache`."""
    return output_of(["-c", f"import {module}; {module}.{function}()"], cache, **environment)


def output_of(arguments: list[str], cache: Path, **environment: str) -> str:
    """What Python prints with such arguments."""
    done = run_python(arguments, cache, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_python(
    arguments: list[str], cache: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    paths = [
        *(path for path in sys.path if path.startswith(tests)),
        os.environ.get("PYTHONPATH", ""),
    ]
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    told.pop("TRITON_INTERPRET", None)
    told["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *arguments], env=told, capture_output=True, text=True, timeout=600
    )
