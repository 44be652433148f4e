"""Which backends will run, each asked itself, and how to get the others."""

from resfuse.bench.common.finding import BROKEN, NOTE, Finding


def backends(device: str) -> list[Finding]:
    """Names the backends that can run in a line, then gives each that cannot a line of its own.

    Without eager the part is broken.
    """
    import torch

    from resfuse.bench.backends import BACKENDS, why_unavailable

    here = torch.device(device)
    there, absent = [], []
    for name, backend in BACKENDS.items():
        reason = why_unavailable(name, here)
        if reason is None:
            there.append(name)
        elif "not installed" in reason:
            absent.append(Finding(name, f"{reason}: pip install '{backend.package}'", NOTE))
        else:
            absent.append(Finding(name, reason, NOTE))
    state = "ok" if "eager" in there else BROKEN
    return [Finding("will run", ", ".join(there), state), *absent]
