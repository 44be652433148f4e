"""The flags of `resfuse doctor`."""

import argparse

from resfuse.bench.running.shared_flags import add_device, add_results


def add_doctor(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_results(parser, "where `resfuse bench` would write (default: results)")
