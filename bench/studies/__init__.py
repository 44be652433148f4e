"""STUDIES: questions answered by measurement, `resfuse study NAME`.

A study is an entry here, its flags in bench/flags.py, and a file or a package of its name.
"""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from resfuse.bench import flags


@dataclass(frozen=True)
class Study:
    run: str  # "module:function", imported when used: takes the parsed flags, returns the exit code
    add_flags: Callable[[argparse.ArgumentParser], None]
    does: str  # for `resfuse study --help`


STUDIES: dict[str, Study] = {
    "overhead": Study(
        "resfuse.bench.studies.overhead:run",
        flags.add_overhead,
        "does the harness slow down what it measures?",
    ),
    "gate": Study(
        "resfuse.bench.studies.gate:run",
        flags.add_gate,
        "how often does `resfuse compare` cry wolf, and what does it miss?",
    ),
    "depth": Study(
        "resfuse.bench.studies.depth:run",
        flags.add_depth,
        "time, memory and error from 18 to 1202 layers, by backend",
    ),
    "degradation": Study(
        "resfuse.bench.studies.degradation.command:run",
        flags.add_degradation,
        "plain against residual networks of growing depth, trained on real data",
    ),
    "training": Study(
        "resfuse.bench.studies.training.command:run",
        flags.add_training_study,
        "does a network trained fused learn as it does unfused?",
    ),
}


def load_study(name: str) -> Callable[[argparse.Namespace], int]:
    """The function behind a name in STUDIES."""
    module, function = STUDIES[name].run.split(":")
    study: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), function)
    return study
