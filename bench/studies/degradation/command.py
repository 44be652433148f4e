"""`resfuse study degradation`, once its arguments are parsed."""

import argparse

from resfuse.bench.studies.degradation.plan import plan
from resfuse.bench.studies.degradation.row import SHEET
from resfuse.bench.studies.learning.command import kind_of, study


def run(args: argparse.Namespace) -> int:
    """Trains what has not been trained yet; returns 1 if a training failed."""
    runs = plan(kind_of(args.data), args.depths, args.shortcuts, args.seeds, args.epochs)
    return study(args, lambda device: runs, SHEET)
