"""GPUS: the peak rates in the data sheets of GPUs, for plans made without the GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The peak rates of a GPU. Measurements reach about 80 % of its TFLOP/s and 90 % of its TB/s.

    Attributes:
        tflops: dense TFLOP/s by math mode; of int8, tera-operations.
        tb_per_s: the bandwidth of its memory.
        source: the data sheet.
    """

    name: str
    tflops: dict[str, float]
    tb_per_s: float
    source: str = ""

    def ms(self, math_mode: str, flops: int, moved: int) -> float:
        """Returns the least ms for a number of FLOPs and bytes."""
        return max(self._flops_ms(math_mode, flops), self._bytes_ms(moved))

    def bound(self, math_mode: str, flops: int, moved: int) -> str:
        """Returns which of the two takes longer, "FLOPs" or "bytes"."""
        return "bytes" if self._bytes_ms(moved) > self._flops_ms(math_mode, flops) else "FLOPs"

    def _flops_ms(self, math_mode: str, flops: int) -> float:
        return flops / self.tflops[math_mode] / 1e9

    def _bytes_ms(self, moved: int) -> float:
        return moved / self.tb_per_s / 1e9


def _rates(int8: float, half: float, tf32: float, fp32: float) -> dict[str, float]:
    wide = {"fp16": half, "bf16": half, "tf32": tf32, "ieee": fp32}
    return wide | {"int8": int8, "int8_fp32": int8}


# Dense rates: where a source counts zeros that are skipped (*), half of its number stands here.
# H100 and H200: 3958* in int8, 1979*, 989*, 67. B200: 9000*, 4500*, 2200*, 75. L4: 485*, 242*,
# 120*, 30.3. A100 (80 GB), H100, H200 and B200 are SXM modules. GeForce cards multiply fp16 twice
# as fast where they also add in it; all that is measured here adds in fp32.
_SITE = "https://www.nvidia.com/en-us/data-center"
_AMD = "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets"
GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100", _rates(624, 312, 156, 19.5), 2.039, f"{_SITE}/a100/"),
    "h100": Gpu("H100", _rates(1979, 989.5, 494.5, 67), 3.35, f"{_SITE}/h100/"),
    "h200": Gpu("H200", _rates(1979, 989.5, 494.5, 67), 4.8, f"{_SITE}/h200/"),
    "b200": Gpu("B200", _rates(4500, 2250, 1100, 75), 7.7, f"{_SITE}/hgx/"),
    "l4": Gpu("L4", _rates(242.5, 121, 60, 30.3), 0.3, f"{_SITE}/l4/"),
    "l40s": Gpu("L40S", _rates(733, 362.05, 183, 91.6), 0.864, f"{_SITE}/l40s/"),
    "rtx4090": Gpu(
        "GeForce RTX 4090", _rates(660.6, 165.2, 82.6, 82.6), 1.008,
        "NVIDIA Ada GPU Architecture, whitepaper V2.01, appendix A",
    ),
    "rtx5090": Gpu(
        "GeForce RTX 5090", _rates(838, 209.5, 104.8, 104.8), 1.792,
        "NVIDIA RTX Blackwell GPU Architecture, whitepaper, appendix A",
    ),
    "mi300x": Gpu(
        "Instinct MI300X", _rates(2614.9, 1307.4, 653.7, 163.4), 5.3,
        f"{_AMD}/amd-instinct-mi300x-data-sheet.pdf",
    ),
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Returns the GPU of a name in GPUS, and raises ValueError for any other name."""
    if name not in GPUS:
        raise ValueError(f"argument gpu: {name!r} is not known; accepted: {', '.join(GPUS)}")
    return GPUS[name]
