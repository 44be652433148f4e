"""The flags of `resfuse bench`."""

import argparse

from resfuse.bench.records.case import LATENCY, MEMORY_FORMATS, MODES, SCENARIOS
from resfuse.bench.running.profiles import NAMES
from resfuse.bench.running.shared_flags import (
    add_backends,
    add_batch_sizes,
    add_device,
    add_img_size,
    add_model_kwargs,
    add_model_names,
    add_precisions,
    add_results,
    add_resumable,
    add_seconds,
    add_seed,
    add_threads,
    add_timeout,
    add_weights,
    names,
    pair,
    positive,
    rate,
    share,
)
from resfuse.bench.running.world import PARALLEL


def add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--profile",
        choices=NAMES,
        default="quick",
        help="a ready-made sweep; the flags below replace its parts (default: quick)",
    )
    add_model_names(what)
    backends = what.add_mutually_exclusive_group()
    add_backends(backends, "ways to run them; see `resfuse list backends`")
    _add_ab(backends)
    add_batch_sizes(what, "images; never changed behind your back")
    add_precisions(what)
    formats = what.add_mutually_exclusive_group()
    formats.add_argument(
        "--memory-format",
        type=names,
        default=[],
        metavar="NAMES",
        help=f"{', '.join(MEMORY_FORMATS)} (default: both)",
    )
    formats.add_argument(
        "--channels-last",
        dest="memory_format",
        action="store_const",
        const=["channels_last"],
        help="channels_last alone",
    )
    what.add_argument(
        "--bench",
        type=names,
        default=["inference"],
        metavar="MODES",
        help=f"{', '.join(MODES)} (default: inference)",
    )
    _add_scenario(what)
    add_img_size(what)
    add_device(what)
    _add_parallel(what)
    add_model_kwargs(what)
    add_weights(what)
    what.add_argument(
        "--images",
        default="bundled",
        metavar="DIR",
        help="your own images instead of the bundled photographs",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--baseline",
        default="eager",
        metavar="NAME",
        help="what speed-ups are measured against, in the same rounds (default: eager)",
    )
    how.add_argument(
        "--baseline-memory-format", default="contiguous", metavar="NAME", help="default: contiguous"
    )
    add_seconds(how, "timed seconds a case (default: the profile's; at most 60 with --ci)")
    _add_ci(how)
    add_timeout(how)
    add_threads(how)
    add_seed(how, "of the seeded weights, and of when batches arrive")
    out = parser.add_argument_group("results")
    add_results(out)
    add_resumable(out, "cases")


def _add_ab(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "--ab",
        type=pair,
        metavar="A,B",
        help="two backends against each other: A is the baseline; stops by --ci (default: 2%%)",
    )


def _add_scenario(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scenario",
        choices=SCENARIOS,
        default=LATENCY,
        help="one batch after the other; a stream for each CPU core, all busy; or batches that "
        "arrive at random (default: latency)",
    )
    group.add_argument(
        "--qps",
        type=rate,
        metavar="N",
        help="batches that arrive in a second, for --scenario server; max: the most that keep "
        "--latency-bound",
    )
    group.add_argument(
        "--latency-bound",
        type=positive,
        metavar="MS",
        help="what the 99th percentile must not pass, for --qps max",
    )


def _add_parallel(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--parallel",
        choices=PARALLEL,
        help="how processes that torchrun has started share a training step; the batch is each "
        "one's (default: ddp)",
    )
    parser.set_defaults(world_size=0)


def _add_ci(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ci",
        type=share,
        metavar="P",
        help="stop a case once its speed-up's 95 %% interval is narrower than this, e.g. 2%%",
    )
