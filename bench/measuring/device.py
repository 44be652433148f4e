"""Resolves `--device`."""

from resfuse.bench.common.errors import UsageError


def resolve_device(asked: str) -> str:
    """Returns the device to run on; "auto" is the GPU where there is one.

    Raises:
        UsageError: torch cannot use the device that was asked for.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError) as error:
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"argument --device: '{asked}' cannot be used: {reason}; accepted here: {here}"
        ) from None
    if torch.device(asked).type not in ("cpu", "cuda"):
        raise UsageError(f"argument --device: '{asked}'; accepted: cpu, cuda, cuda:N")
    return asked
