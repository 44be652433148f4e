"""The `resfuse` command. Flags are timm's where timm has them; every list flag takes commas.

Nothing heavy is imported until a command runs, so that `resfuse --help` answers at once.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from resfuse.bench.cli.report_list_inspect_flags import LISTED, add_inspect, add_list, add_report
from resfuse.bench.cluster.sweep_flags import add_sweep
from resfuse.bench.common.errors import LeftOutWarning, UsageError
from resfuse.bench.common.subcommand import Subcommand
from resfuse.bench.compare.compare_flags import add_compare
from resfuse.bench.doctor.doctor_flags import add_doctor
from resfuse.bench.engine.engine_flags import add_engine
from resfuse.bench.engine.roofline_flags import add_roofline
from resfuse.bench.layers.kernel_check.check_flags import add_check
from resfuse.bench.layers.layers_flags import add_kernels, add_layers
from resfuse.bench.running.bench_flags import add_bench
from resfuse.bench.studies import add_studies

INTERRUPTED = 130
UNREAD = 1  # what rich's console exits with

COMMANDS: dict[str, Subcommand] = {
    "bench": Subcommand(
        "resfuse.bench.distributed.bench_entry:bench",
        add_bench,
        "measure networks and write the report",
    ),
    "kernels": Subcommand(
        "resfuse.bench.layers.kernels_command:kernels",
        add_kernels,
        "measure every convolution of a network by itself",
    ),
    "report": Subcommand(
        "resfuse.bench.cli.report_list_inspect:report",
        add_report,
        "write the report of results already measured",
    ),
    "compare": Subcommand(
        "resfuse.bench.compare.compare_command:compare",
        add_compare,
        "is B slower than A, and can one tell? exit 1 on a regression",
    ),
    "list": Subcommand(
        "resfuse.bench.cli.report_list_inspect:list_registry", add_list, ", ".join(LISTED)
    ),
    "study": Subcommand(
        "resfuse.bench.studies:run",
        add_studies,
        "questions about the harness and the networks, answered by measurement",
    ),
    "inspect": Subcommand(
        "resfuse.bench.cli.report_list_inspect:inspect",
        add_inspect,
        "compile every kernel for GPUs that need not be here; exit 1 on a problem",
    ),
    "sweep": Subcommand(
        "resfuse.bench.cluster.sweep_command:sweep_on_cluster",
        add_sweep,
        "measure networks as jobs of a cluster",
    ),
    "check": Subcommand(
        "resfuse.bench.layers.kernel_check.check_command:check",
        add_check,
        "try every configuration of our kernels against fp64",
    ),
    "engine": Subcommand(
        "resfuse.bench.engine.engine_command:engine",
        add_engine,
        "build an engine of a network; explain, check and time it",
    ),
    "roofline": Subcommand(
        "resfuse.bench.engine.roofline_command:roofline",
        add_roofline,
        "the least time of networks, here or on GPUs that need not be here",
    ),
    "layers": Subcommand(
        "resfuse.bench.layers.layers_command:layers",
        add_layers,
        "a network layer by layer, provider by provider, beside the whole network",
    ),
    "doctor": Subcommand(
        "resfuse.bench.doctor.doctor_command:doctor",
        add_doctor,
        "what this machine has for `resfuse`, on a page",
    ),
    "gpu-plan": Subcommand(
        "resfuse.tools.gpu_plan.gpu_plan_command:gpu_plan",
        "resfuse.tools.gpu_plan.gpu_plan_flags:add_gpu_plan",
        "all there is to measure on a GPU, most valuable first, in one command",
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence and exit code 2, without usage lines in front."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 where `inspect` found problems or `compare` a
    regression, 2 for bad input, 130 after Ctrl-C, 1 where nothing reads the output."""
    try:
        parsed = parser().parse_args(arguments)
        with _warnings_in_a_sentence():
            code = COMMANDS[parsed.command].load()(parsed)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"resfuse: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("resfuse: interrupted; the rows measured so far are kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `resfuse list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return UNREAD


@contextlib.contextmanager
def _warnings_in_a_sentence() -> Iterator[None]:
    """Prints warnings about what is left out without the line of code that found it."""
    before = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> str:
        if issubclass(category, LeftOutWarning):
            return f"resfuse: warning: {message}\n"
        return before(message, category, *rest, **named)

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands and flags; it sets `command` to a name in COMMANDS."""
    top = _Parser(
        prog="resfuse", description="Benchmarks for residual networks that you can trust."
    )
    names = top.add_subparsers(required=True, metavar="COMMAND")  # of the parser's own class
    for name, command in COMMANDS.items():
        own = names.add_parser(name, help=command.does)
        command.flags(own)
        own.set_defaults(command=name)
    return top


if __name__ == "__main__":
    sys.exit(main())
