"""What does another hundred layers cost? Time, memory, MACs and error against fp64 by depth.

A sweep like any other: `resfuse bench` would measure the same cases and settle the same rows. The
networks are those of He et al. 2015 (arXiv:1512.03385) and the 200 layers of He et al. 2016
(arXiv:1603.05027), plain ones beside the residual ones whose twins they are. Every backend runs in
channels_last, so that two lines of a plot differ in one thing only.

The batches are small on a CPU because each case also answers three of them in fp64, and 1,202
layers take 2.8 GMACs an image.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from resfuse.bench.common.selection import pick
from resfuse.bench.measuring.clock import timing
from resfuse.bench.records.case import Request
from resfuse.bench.running.session import measure_all

BACKENDS = ("eager", "fused", "engine")


@dataclass(frozen=True)
class Part:
    """Networks for images of one size."""

    models: tuple[str, ...]
    compiled: tuple[str, ...]  # those that torch.compile gets through within a minute on two cores
    batch_sizes: dict[str, int]  # by kind of device


PARTS = (
    Part(
        (
            "cifar_plain20", "cifar_plain32", "cifar_plain44", "cifar_plain56", "cifar_plain110",
            "cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56",
            "cifar_resnet110", "cifar_resnet1202",
        ),
        ("cifar_plain20", "cifar_plain56", "cifar_resnet20", "cifar_resnet56"),
        {"cpu": 8, "cuda": 128},
    ),
    Part(
        (
            "plain18", "plain34", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
            "preact_resnet200",
        ),
        ("plain18", "plain34", "resnet18", "resnet34", "resnet50"),
        {"cpu": 1, "cuda": 32},
    ),
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs `resfuse study depth`: a sweep that ends with the budget, and its report."""
    watch = timing.Watch()
    return measure_all(
        args,
        lambda device: requests(args, device),
        lambda: args.budget - timing.seconds(watch.elapsed()),
    )


def requests(args: argparse.Namespace, device: str) -> list[Request]:
    """Returns what the flags ask for on a device.

    By default the quick backends come first, with every network, and torch.compile last, with the
    networks it has time for; a backend that is named gets every network.

    Raises:
        UsageError: `--model` names none of the study's networks.
    """
    every = [model for part in PARTS for model in part.models]
    chosen = pick("--model", args.model or ["*"], every)
    kind = "cpu" if device == "cpu" else "cuda"  # "auto" is asked for facts only
    asked = [(part.models, args.backend or BACKENDS, part.batch_sizes[kind]) for part in PARTS]
    if not args.backend:
        asked += [(part.compiled, ("compiled",), part.batch_sizes[kind]) for part in PARTS]
    return [
        _request(args, device, own, backends, batch_size)
        for models, backends, batch_size in asked
        if (own := [model for model in models if model in chosen])
    ]


def _request(
    args: argparse.Namespace,
    device: str,
    models: Sequence[str],
    backends: Sequence[str],
    batch: int,
) -> Request:
    return Request(
        profile="quick", device=device, models=list(models), backends=list(backends),
        batch_sizes=args.batch_size or [batch], precisions=args.precision,
        memory_formats=["channels_last"],
    )  # fmt: skip
