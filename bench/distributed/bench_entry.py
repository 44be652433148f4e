"""`resfuse bench`, whether a user has started it or torchrun has."""

import argparse
import os

from resfuse.bench.running.session import bench_request
from resfuse.bench.running.world import launched


def bench(args: argparse.Namespace) -> int:
    """`resfuse bench`, by itself or as one of the processes that torchrun has started."""
    if launched(os.environ):
        from resfuse.bench.distributed.leader import bench as bench_together

        return bench_together(args)
    return bench_request(args)
