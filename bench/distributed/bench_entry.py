"""The entry of `resfuse bench`, whether a user or torchrun starts it."""

import argparse
import os

from resfuse.bench.running.session import bench_request
from resfuse.bench.running.world import launched


def bench(args: argparse.Namespace) -> int:
    """Runs `resfuse bench`, by itself or as one of torchrun's processes."""
    if launched(os.environ):
        from resfuse.bench.distributed.leader import bench as bench_together

        return bench_together(args)
    return bench_request(args)
