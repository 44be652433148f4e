"""How far apart two right answers may be: the one table, for fuse, the harness and the tests.

About eight units of each format's last place: two roundings in different order are no error. fp16's
and tf32's mantissas have 10 bits, bf16's 7. int8 has one unit of the 127 on a side of zero.
"""

from dataclasses import dataclass

EAGER_FACTOR = 2.0  # a fused answer may be that much further from fp64 than eager's own


@dataclass(frozen=True)
class Tolerance:
    """Slack of one math mode: `atol` of an element, `rtol` relative, norm or element."""

    atol: float
    rtol: float


TOLERANCES = {
    "fp64": Tolerance(1e-14, 1e-14),
    "ieee": Tolerance(1e-6, 1e-6),
    "tf32": Tolerance(1e-3, 1e-3),
    "fp16": Tolerance(1e-3, 1e-3),
    "bf16": Tolerance(8e-3, 8e-3),
    "int8": Tolerance(8e-3, 8e-3),
    "amp_fp16": Tolerance(1e-3, 1e-3),
    "amp_bf16": Tolerance(8e-3, 8e-3),
}
