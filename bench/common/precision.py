"""Sets torch's fp32 arithmetic to the case's math mode, for every backend in the process alike."""

import torch

from resfuse.bench.common.errors import Unavailable


def set_math_mode(math_mode: str, device: str) -> None:
    """Fixes how fp32 numbers are multiplied in matrix products and convolutions.

    fp16 and bf16 are storage types: whatever fp32 arithmetic remains beside them is ieee. On a CPU
    torch multiplies fp32 as ieee by default, and that is left as it is.

    Raises:
        Unavailable: tf32 on a device without it.
    """
    if math_mode == "tf32" and device != "cuda":
        raise Unavailable("tf32 is a math mode of NVIDIA GPUs; on a CPU use float32")
    # The older pair of switches: with the newer fp32_precision ones set to "ieee", torch 2.14's own
    # torch.export fails, because reading the older ones then raises.
    torch.backends.cuda.matmul.allow_tf32 = math_mode == "tf32"
    torch.backends.cudnn.allow_tf32 = math_mode == "tf32"


def tf32_allowed() -> bool:
    """Returns what `set_math_mode` decided, for backends that bring their own arithmetic."""
    return torch.backends.cudnn.allow_tf32
