"""`resfuse study degradation`: the result that residual networks were made for, measured again.

He et al. 2015 (arXiv:1512.03385), figure 6: as plain networks get deeper their training error goes
up, which no overfitting explains; that of residual networks does not. plan.py says what is trained,
row.py what is kept; the rest is shared with other studies (learning/).
"""

import argparse

from resfuse.bench.studies.degradation_runs import plan
from resfuse.bench.studies.training_session import kind_of, study
from resfuse.bench.trainings.degradation_sheet import SHEET


def run(args: argparse.Namespace) -> int:
    """Trains what has not been trained yet; returns 1 if a training failed."""
    runs = plan(kind_of(args.data), args.depths, args.shortcuts, args.seeds, args.epochs)
    return study(args, lambda device: runs, SHEET)
