"""The flags of `resfuse sweep`: those of `resfuse bench`, and what the jobs of a cluster need."""

import argparse

from resfuse.bench.running.bench_flags import add_bench
from resfuse.bench.running.shared_flags import rounds


def add_sweep(parser: argparse.ArgumentParser) -> None:
    add_bench(parser)
    jobs = parser.add_argument_group("jobs")
    jobs.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        required=True,
        help="slurm: a cluster's jobs; local: the same jobs on this machine, one after the other",
    )
    jobs.add_argument(
        "--shard", type=rounds, default=1, metavar="N", help="cases a job (default: %(default)s)"
    )
    jobs.add_argument("--partition", metavar="NAME", help="Slurm's (default: the cluster's)")
    jobs.add_argument("--account", metavar="NAME", help="who pays (default: the cluster's)")
    jobs.add_argument("--cpus", type=rounds, metavar="N", help="cores a job")
    jobs.add_argument("--gpus", type=rounds, metavar="N", help="GPUs a job; without, the CPU")
    jobs.add_argument(
        "--minutes",
        type=rounds,
        default=60,
        metavar="N",
        help="a job's time limit; one that reaches it is queued again (default: %(default)s)",
    )
    jobs.add_argument("--exclusive", action="store_true", help="no other job on the same machine")
