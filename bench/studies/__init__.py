"""STUDIES: questions answered by measurement, `resfuse study NAME`.

A study is an entry here, its flags in bench/flags/studies.py, and a file or a package of its name.
"""

import argparse

from resfuse.bench.flags.studies import (
    add_degradation,
    add_depth,
    add_gate,
    add_models,
    add_overhead,
    add_training,
)
from resfuse.bench.subcommand import Subcommand

STUDIES: dict[str, Subcommand] = {
    "overhead": Subcommand(
        "resfuse.bench.studies.overhead:run",
        add_overhead,
        "does the harness slow down what it measures?",
    ),
    "gate": Subcommand(
        "resfuse.bench.studies.gate:run",
        add_gate,
        "how often does `resfuse compare` cry wolf, and what does it miss?",
    ),
    "depth": Subcommand(
        "resfuse.bench.studies.depth:run",
        add_depth,
        "time, memory and error from 18 to 1202 layers, by backend",
    ),
    "degradation": Subcommand(
        "resfuse.bench.studies.degradation.command:run",
        add_degradation,
        "plain against residual networks of growing depth, trained on real data",
    ),
    "training": Subcommand(
        "resfuse.bench.studies.training.command:run",
        add_training,
        "does a network trained fused learn as it does unfused?",
    ),
    "models": Subcommand(
        "resfuse.bench.studies.models.command:run",
        add_models,
        "do fuse and the engine answer as 200 networks of timm and torchvision do?",
    ),
}


def add_studies(parser: argparse.ArgumentParser) -> None:
    """A command for each study; `study` of what they parse is its name."""
    names = parser.add_subparsers(required=True, metavar="NAME")
    for name, study in STUDIES.items():
        own = names.add_parser(name, help=study.does, description=study.does)
        study.flags(own)
        own.set_defaults(study=name)


def run(args: argparse.Namespace) -> int:
    return STUDIES[args.study].load()(args)
