"""`resfuse doctor`, once its arguments are parsed: part by part, and what it comes to."""

import argparse
from functools import partial

from resfuse.bench.common.finding import BROKEN, Finding, Part, looked
from resfuse.bench.doctor.backend_findings import backends
from resfuse.bench.doctor.doctor_page import close, show
from resfuse.bench.doctor.processors import arithmetic, device_part, rates
from resfuse.bench.doctor.software import compilers, packages, providers, ptxas
from resfuse.bench.measuring.probes.noise import noise


def doctor(args: argparse.Namespace) -> int:
    """Prints the page; returns 1 where something `make bench` needs is broken.

    Raises:
        UsageError: the device that was asked for cannot be used.
    """
    software = looked(Part("Software", packages))
    found = [*software]
    if any(one.name == "torch" and one.state == BROKEN for one in software):
        show("Software", software)
        return close(found)
    from resfuse.bench.measuring.device import resolve_device

    device = resolve_device(args.device)
    for look in (providers, compilers, ptxas):
        software += looked(Part("Software", look))
    parts = [
        Part("Device", partial(device_part, device)),
        Part("Software", lambda: software),
        Part("Arithmetic", partial(arithmetic, device)),
        Part("Backends", partial(backends, device)),
        Part("Noise", partial(noise, device)),
        Part("Results", partial(rates, device, args.results)),
    ]
    every: list[Finding] = []
    for part in parts:
        lines = looked(part)
        show(part.title, lines)
        every += lines
    return close(every)
