"""The command line that measures a row again."""

import shlex
from collections.abc import Mapping

from resfuse.bench.models.sources import SOURCES as PREFIXES
from resfuse.bench.report.data.result import Result, Setting

DEFAULTS = {
    "baseline": "eager",
    "baseline-memory-format": "contiguous",
    "weights": "seeded",
    "images": "bundled",
}


def command_line(result: Result, setting: Setting, facts: Mapping[str, str]) -> str:
    """`resfuse bench ...` for exactly this case, quoted for a shell.

    How long it was timed and the seed are no columns of rows.csv; they are left to their defaults.

    Args:
        facts: of the environment; its device and number of threads are asked for.
    """
    baseline, _, baseline_format = setting.baseline.rpartition(" ")
    words = [
        "resfuse", "bench", "-m", result.name or result.model, "--backend", result.backend,
        "-b", str(result.batch_size), *_size(result),
        "--memory-format", result.memory_format, "--precision", setting.precision,
        "--bench", setting.mode,
    ]  # fmt: skip
    for fact in ("device", "threads"):
        if fact in facts:
            words += [f"--{fact}", facts[fact]]
    asked = {
        "baseline": baseline,
        "baseline-memory-format": baseline_format,
        "weights": setting.weights,
        "images": setting.images,
    }
    if setting.weights == "own":
        del asked["weights"]
    for flag, value in asked.items():
        if value != DEFAULTS[flag]:
            words += [f"--{flag}", value]
    return shlex.join(words)


def _size(result: Result) -> tuple[str, str]:
    shape = result.input_shape
    if not shape and result.name.partition("?")[0].rpartition(":")[0] not in ("", *PREFIXES):
        shape = f"3x{result.img_size}x{result.img_size}"  # a function does not say what it takes
    if shape:
        return "--input-shape", shape.replace("x", ",")
    return "--img-size", str(result.img_size)
