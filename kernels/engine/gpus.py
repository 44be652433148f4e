"""GPUS: what the data sheets of GPUs promise, for plans made without one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak rates; what can be measured of them is about 0.8 of the first and 0.9 of the second.

    tflops: by math mode, dense.
    tb_per_s: of its memory.
    """

    name: str
    tflops: dict[str, float]
    tb_per_s: float

    def ms(self, math_mode: str, flops: int, moved: int) -> float:
        """The least time of so many FLOPs and bytes."""
        return max(flops / self.tflops[math_mode] / 1e9, moved / self.tb_per_s / 1e9)


def _rates(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"fp16": half, "bf16": half, "tf32": tf32, "ieee": fp32}


# NVIDIA's data sheets, of the SXM modules; where they count zeros that are skipped (*), half of it:
# A100 80GB: 312, 156, 19.5 TFLOP/s, 2039 GB/s. H100: 1979*, 989*, 67 TFLOP/s, 3.35 TB/s.
# H200: the same, 4.8 TB/s. B200 (HGX): 4500*, 2200*, 75 TFLOP/s, 7.7 TB/s.
GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100", _rates(312, 156, 19.5), 2.039),
    "h100": Gpu("H100", _rates(989.5, 494.5, 67), 3.35),
    "h200": Gpu("H200", _rates(989.5, 494.5, 67), 4.8),
    "b200": Gpu("B200", _rates(2250, 1100, 75), 7.7),
}


def gpu_named(name: str) -> Gpu:
    """Raises ValueError for one that is not in GPUS."""
    if name not in GPUS:
        raise ValueError(f"argument gpu: {name!r} is not known; accepted: {', '.join(GPUS)}")
    return GPUS[name]
