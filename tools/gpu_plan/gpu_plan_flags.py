"""The flags of `resfuse gpu-plan`."""

import argparse
from pathlib import Path

from resfuse.bench.running.shared_flags import names, positive
from resfuse.tools.gpu_plan.plan_steps import BUDGET_S, LIMIT_MB, PARTS


def add_gpu_plan(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    what.add_argument("--list", action="store_true", help="show the steps and stop")
    what.add_argument(
        "--part",
        choices=PARTS,
        default=PARTS[-1],
        help="the last part to be taken: the first is the headline, the second other depths, the "
        "third what can wait (default: %(default)s)",
    )
    what.add_argument(
        "--steps",
        type=names,
        default=["*"],
        metavar="NAMES",
        help="some steps of them; wildcards allowed (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=BUDGET_S,
        metavar="S",
        help="seconds for all of it (default: %(default)g)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="skip steps and cases that are already done"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run every step for real on the CPU, on a tiny network",
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        help="a folder for this environment is made in it (default: results; with --dry-run a "
        "temporary one)",
    )
    parser.add_argument("--no-report", action="store_true", help="rows and notes only")
    away = parser.add_argument_group("on a machine that is only lent")
    away.add_argument(
        "--archive",
        metavar="FILE",
        type=Path,
        help="a tar.xz of rows, answers, times and caches, written after every step and at the "
        f"end, however that comes; at most {LIMIT_MB} MB",
    )
    away.add_argument(
        "--carried",
        metavar="FILE",
        type=Path,
        help="kernels that were compiled elsewhere, unpacked before anything else; a stale one "
        "costs only the time to compile anew",
    )
    away.add_argument(
        "--from",
        dest="go_on_from",
        metavar="FILE",
        type=Path,
        help="an earlier archive: put in its place, and gone on from (as with --resume)",
    )
    away.add_argument(
        "--restore",
        metavar="FILE",
        type=Path,
        help="put an archive's rows into --results and its times into the user's cache, write the "
        "reports and stop",
    )
