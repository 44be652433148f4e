"""STUDIES: questions answered by measurement, `resfuse study NAME`.

A study is an entry here and a file or a package of its name; its flags are in study_flags.py, or in
its package.
"""

import argparse

from resfuse.bench.common.subcommand import Subcommand
from resfuse.bench.studies.contention.contention_flags import add_contention
from resfuse.bench.studies.models.models_flags import add_models
from resfuse.bench.studies.quantization.quantization_flags import add_quantization
from resfuse.bench.studies.study_flags import (
    add_degradation,
    add_depth,
    add_gate,
    add_overhead,
    add_training,
)

STUDIES: dict[str, Subcommand] = {
    "overhead": Subcommand(
        "resfuse.bench.studies.overhead_study:run",
        add_overhead,
        "does the harness slow down what it measures?",
    ),
    "gate": Subcommand(
        "resfuse.bench.studies.gate_study:run",
        add_gate,
        "how often does `resfuse compare` cry wolf, and what does it miss?",
    ),
    "depth": Subcommand(
        "resfuse.bench.studies.depth_study:run",
        add_depth,
        "time, memory and error from 18 to 1202 layers, by backend",
    ),
    "degradation": Subcommand(
        "resfuse.bench.studies.degradation_study:run",
        add_degradation,
        "plain against residual networks of growing depth, trained on real data",
    ),
    "training": Subcommand(
        "resfuse.bench.studies.training_study:run",
        add_training,
        "does a network trained fused learn as it does unfused?",
    ),
    "models": Subcommand(
        "resfuse.bench.studies.models.models_study:run",
        add_models,
        "do fuse and the engine answer as 200 networks of timm and torchvision do, and how fast?",
    ),
    "contention": Subcommand(
        "resfuse.bench.studies.contention.contention_study:run",
        add_contention,
        "what is left of each backend's speed beside busy processes, or in several threads?",
    ),
    "quantization": Subcommand(
        "resfuse.bench.studies.quantization.quantization_study:run",
        add_quantization,
        "what do trained networks lose in int8, by calibration method and by tool?",
    ),
}


def add_studies(parser: argparse.ArgumentParser) -> None:
    """Adds a command for each study, which sets `study` to its name."""
    names = parser.add_subparsers(required=True, metavar="NAME")
    for name, study in STUDIES.items():
        own = names.add_parser(name, help=study.does, description=study.does)
        study.flags(own)
        own.set_defaults(study=name)


def run(args: argparse.Namespace) -> int:
    return STUDIES[args.study].load()(args)
