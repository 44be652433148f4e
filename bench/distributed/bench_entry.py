"""`resfuse bench`, whether a user has started it or torchrun has."""

import argparse
import os

from resfuse.bench.bench_command import bench_request
from resfuse.bench.distributed.world import launched


def bench(args: argparse.Namespace) -> int:
    """`resfuse bench`, by itself or as one of the processes that torchrun has started."""
    if launched(os.environ):
        from resfuse.bench.distributed.command import bench as bench_together

        return bench_together(args)
    return bench_request(args)
