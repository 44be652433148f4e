"""The instructions of compiled NVIDIA kernels, many of them in one call of nvdisasm.

nvdisasm takes 0.2 s to start and some milliseconds a kernel (Epyc Genoa), so the machine code of
all kernels for one GPU is put end to end and taken apart again by address.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import sm_arch_from_capability

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of an ELF section: it is part of the program, and it is instructions.
_PROGBITS, _EXECUTABLE = 1, 4
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/")


def disassemble(cubins: Sequence[bytes], capability: int) -> list[str]:
    """Returns the instructions of each kernel as text, a line each, without labels.

    Args:
        cubins: as Triton's compiler makes them, all for the same GPU.
        capability: that GPU's, 90 for 9.0.

    Raises:
        ValueError: one is no cubin.
        subprocess.CalledProcessError: nvdisasm does not understand one.
    """
    codes = [b"".join(_code_of(cubin)) for cubin in cubins]
    if not any(codes):
        return [""] * len(codes)
    gpu = sm_arch_from_capability(capability).replace("sm_", "SM")  # SM90a
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        # without data flow, which labels jumps and costs a fifth more
        listing = output_of("nvdisasm", "-b", gpu, "-ndf", file.name)
    lines: list[list[str]] = [[] for _ in codes]
    at, end = 0, len(codes[0])
    for line in listing.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        while int(instruction[1], 16) >= end:
            at += 1
            end += len(codes[at])
        lines[at].append(line)
    return ["\n".join(each) for each in lines]


def output_of(tool: str, *arguments: str) -> str:
    """Runs one of the tools that Triton carries for NVIDIA's GPUs."""
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout


def _code_of(cubin: bytes) -> Iterator[bytes]:
    """The sections of a 64-bit ELF file that hold instructions."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("no cubin: it does not start as a 64-bit ELF file does")
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    for number in range(count):
        _, kind, flags, _, offset, length = struct.unpack_from(
            "<IIQQQQ", cubin, start + number * size
        )
        if kind == _PROGBITS and flags & _EXECUTABLE:
            yield cubin[offset : offset + length]
