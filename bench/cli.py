"""The `resfuse` command. Flags are timm's where timm has them; every list flag takes commas.

Nothing heavy is imported until a command runs, so that `resfuse --help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from resfuse.bench import flags
from resfuse.bench.case import MEMORY_FORMATS, MODES, PRECISIONS, Options
from resfuse.bench.errors import UsageError
from resfuse.bench.profiles import NAMES
from resfuse.bench.studies import STUDIES

INTERRUPTED = 130
LISTED = ("models", "backends", "kernels", "providers", "metrics", "profiles")


class _Parser(argparse.ArgumentParser):
    """One sentence and exit code 2, without the usage lines in front of it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 where `inspect` found problems or `compare` a
    regression, 2 for bad input, 130 after Ctrl-C."""
    try:
        parsed = parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = parsed.command
        return command(parsed)
    except UsageError as error:
        print(f"resfuse: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("resfuse: interrupted; the rows measured so far are kept", file=sys.stderr)
        return INTERRUPTED


def _bench(args: argparse.Namespace) -> int:
    from resfuse.bench.distributed.world import launched

    if launched(os.environ):
        from resfuse.bench.distributed.command import bench as bench_together

        return bench_together(args)
    from resfuse.bench.commands import bench

    return bench(args)


def _sweep(args: argparse.Namespace) -> int:
    from resfuse.bench.cluster.command import sweep_on_cluster

    return sweep_on_cluster(args)


def _kernels(args: argparse.Namespace) -> int:
    from resfuse.bench.kernels.command import kernels

    return kernels(args)


def _report(args: argparse.Namespace) -> int:
    from resfuse.bench.commands import report

    return report(args)


def _compare(args: argparse.Namespace) -> int:
    from resfuse.bench.compare.command import compare

    return compare(args)


def _list(args: argparse.Namespace) -> int:
    from resfuse.bench.commands import list_registry

    return list_registry(args)


def _study(args: argparse.Namespace) -> int:
    from resfuse.bench.studies import load_study

    return load_study(args.study)(args)


def _inspect(args: argparse.Namespace) -> int:
    from resfuse.bench.commands import inspect

    return inspect(args)


def _check(args: argparse.Namespace) -> int:
    from resfuse.bench.kernels.check_command import check

    return check(args)


def _engine(args: argparse.Namespace) -> int:
    from resfuse.bench.engine_command import engine

    return engine(args)


def _roofline(args: argparse.Namespace) -> int:
    from resfuse.bench.roofline_command import roofline

    return roofline(args)


def _layers(args: argparse.Namespace) -> int:
    from resfuse.bench.layers_command import layers

    return layers(args)


def _doctor(args: argparse.Namespace) -> int:
    from resfuse.bench.doctor.command import doctor

    return doctor(args)


def _gpu_plan(args: argparse.Namespace) -> int:
    from resfuse.bench.gpu_plan.command import gpu_plan

    return gpu_plan(args)


def parser() -> argparse.ArgumentParser:
    """Every command and flag; `command` of what it parses runs it."""
    top = _Parser(
        prog="resfuse", description="Benchmarks for residual networks that you can trust."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_bench(commands.add_parser("bench", help="measure networks and write the report"))
    _add_kernels(
        commands.add_parser("kernels", help="measure every convolution of a network by itself")
    )
    report = commands.add_parser("report", help="write the report of results already measured")
    report.add_argument("--results", metavar="DIR", nargs="+", type=Path, default=[Path("results")],
                        help="results folders, or a folder of them (default: results)")  # fmt: skip
    report.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="one page over all the folders instead of two in each: HTML if FILE ends in .html, "
        "otherwise markdown with its plots beside it",
    )
    report.set_defaults(command=_report)
    comparison = commands.add_parser(
        "compare", help="is B slower than A, and can one tell? exit 1 on a regression"
    )
    flags.add_compare(comparison)
    comparison.set_defaults(command=_compare)
    listing = commands.add_parser("list", help=", ".join(LISTED))
    listing.add_argument("what", nargs="?", choices=LISTED)
    listing.set_defaults(command=_list)
    study = commands.add_parser(
        "study", help="questions about the harness and the networks, answered by measurement"
    )
    _add_studies(study)
    inspection = commands.add_parser(
        "inspect", help="compile every kernel for GPUs that need not be here; exit 1 on a problem"
    )
    inspection.add_argument(
        "--kernel",
        type=flags.names,
        default=["*"],
        metavar="NAMES",
        help="wildcards allowed (conv*; default: all)",
    )
    inspection.add_argument(
        "--target",
        type=flags.names,
        default=[],
        metavar="NAMES",
        help="sm_80, sm_90, sm_100, gfx942 (default: the first three)",
    )
    inspection.add_argument(
        "--csv", metavar="FILE", type=Path, help="write every number to this file"
    )
    inspection.set_defaults(command=_inspect)
    sweep = commands.add_parser("sweep", help="measure networks as jobs of a cluster")
    _add_bench(sweep)
    flags.add_sweep(sweep)
    sweep.set_defaults(command=_sweep)
    check = commands.add_parser("check", help="try every configuration of our kernels against fp64")
    flags.add_check(check)
    check.set_defaults(command=_check)
    engine = commands.add_parser(
        "engine", help="build an engine of a network; explain, check and time it"
    )
    flags.add_engine(engine)
    engine.set_defaults(command=_engine)
    roofline = commands.add_parser(
        "roofline", help="the least time of networks, here or on GPUs that need not be here"
    )
    flags.add_roofline(roofline)
    roofline.set_defaults(command=_roofline)
    layers = commands.add_parser(
        "layers", help="a network layer by layer, provider by provider, beside the whole network"
    )
    flags.add_layers(layers)
    layers.set_defaults(command=_layers)
    doctor = commands.add_parser("doctor", help="what this machine has for `resfuse`, on a page")
    flags.add_doctor(doctor)
    doctor.set_defaults(command=_doctor)
    plan = commands.add_parser(
        "gpu-plan", help="all there is to measure on a GPU, most valuable first, in one command"
    )
    flags.add_gpu_plan(plan)
    plan.set_defaults(command=_gpu_plan)
    return top


def _add_studies(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(required=True, metavar="NAME", parser_class=_Parser)
    for name, study in STUDIES.items():
        own = names.add_parser(name, help=study.does, description=study.does)
        study.add_flags(own)
        own.set_defaults(command=_study, study=name)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--profile",
        choices=NAMES,
        default="quick",
        help="a ready-made sweep; the flags below replace its parts (default: quick)",
    )
    what.add_argument(
        "-m",
        "--model",
        type=flags.names,
        default=[],
        metavar="NAMES",
        help="networks; wildcards allowed (resnet*)",
    )
    backends = what.add_mutually_exclusive_group()
    backends.add_argument(
        "--backend",
        type=flags.names,
        default=[],
        metavar="NAMES",
        help="ways to run them; see `resfuse list backends`",
    )
    flags.add_ab(backends)
    what.add_argument(
        "-b",
        "--batch-size",
        type=flags.numbers,
        default=[],
        metavar="N",
        help="images; never changed behind your back",
    )
    what.add_argument(
        "--precision", type=flags.names, default=[], metavar="NAMES", help=", ".join(PRECISIONS)
    )
    formats = what.add_mutually_exclusive_group()
    formats.add_argument(
        "--memory-format",
        type=flags.names,
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
        type=flags.names,
        default=["inference"],
        metavar="MODES",
        help=f"{', '.join(MODES)} (default: inference)",
    )
    flags.add_img_size(what)
    flags.add_device(what)
    flags.add_parallel(what)
    weights = what.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        default="seeded",
        metavar="FILE",
        help="safetensors or torch checkpoint (default: seeded, calibrated on photographs)",
    )
    weights.add_argument(
        "--pretrained",
        dest="weights",
        action="store_const",
        const="pretrained",
        help="torchvision's weights; needs a network",
    )
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
    how.add_argument(
        "--seconds",
        type=flags.positive,
        metavar="S",
        help="timed seconds a case (default: the profile's; at most 60 with --ci)",
    )
    flags.add_ci(how)
    how.add_argument(
        "--timeout",
        type=flags.positive,
        default=Options.timeout_s,
        metavar="S",
        help="limit of a case, set-up included (default: %(default)g)",
    )
    flags.add_threads(how)
    how.add_argument("--seed", type=int, default=0, help="of the seeded weights (default: 0)")
    out = parser.add_argument_group("results")
    flags.add_results(out)
    out.add_argument(
        "--resume",
        action="store_true",
        help="skip what this environment and commit have already settled",
    )
    out.add_argument("--dry-run", action="store_true", help="show the cases and stop")
    out.add_argument("--no-report", action="store_true", help="append rows only")
    parser.set_defaults(command=_bench)


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure: y = relu(conv(x) + b), one by one")
    what.add_argument(
        "-m",
        "--model",
        type=flags.names,
        default=["resnet50"],
        metavar="NAMES",
        help="networks whose convolutions are measured; wildcards allowed (default: resnet50)",
    )
    what.add_argument(
        "--providers",
        type=flags.names,
        default=[],
        metavar="NAMES",
        help="ways to compute one; see `resfuse list providers` (default: all)",
    )
    what.add_argument(
        "-b",
        "--batch-size",
        type=flags.numbers,
        default=[],
        metavar="N",
        help="images (default: 1,8 on a CPU, 1,256 on a GPU)",
    )
    what.add_argument(
        "--precision", type=flags.names, default=[], metavar="NAMES", help=", ".join(PRECISIONS)
    )
    flags.add_img_size(what)
    flags.add_device(what)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--rounds",
        type=flags.rounds,
        metavar="N",
        help="timed runs of each provider (default: 20 on a CPU, 100 on a GPU)",
    )
    how.add_argument(
        "--timeout",
        type=flags.positive,
        default=Options.timeout_s,
        metavar="S",
        help="limit of a convolution, set-up included (default: %(default)g)",
    )
    flags.add_threads(how)
    out = parser.add_argument_group("results")
    flags.add_results(out)
    out.add_argument("--csv", action="store_true", help="print the rows as CSV, too")
    out.add_argument("--dry-run", action="store_true", help="show the convolutions and stop")
    out.add_argument("--no-report", action="store_true", help="append rows only")
    parser.set_defaults(command=_kernels)


if __name__ == "__main__":
    sys.exit(main())
