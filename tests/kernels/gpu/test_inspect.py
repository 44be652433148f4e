"""What the shipped kernels compile to, and that `inspect` finds what is wrong with one.

Compiling needs a process that does not interpret kernels, so this file is imported once more in a
subprocess, and `compiled` calls one of its functions there.
"""
# ruff: noqa: N803 - Triton's convention: compile-time constants are in capitals

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from resfuse.bench.cli import main
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.inspect import inspect as module
from resfuse.kernels.gpu.inspect.disassembly import disassemble
from resfuse.kernels.gpu.inspect.inspect import (
    Inspection,
    compile_launch,
    has_risky_operands,
    inspect_jobs,
    inspect_launch,
    inspect_launches,
    jobs,
    problems,
)
from resfuse.kernels.gpu.inspect.targets import DEFAULT_TARGETS, TARGETS, resident_ctas
from resfuse.kernels.gpu.registry import KERNELS
from resfuse.tools.gpu_plan.carried_archive import move_into_cache, relative

pytestmark = pytest.mark.slow


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, bias_ptr, K,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] + offs_n[None, :] * K)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n)[None, :]
    tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], acc)


@triton.jit
def matmul_twice(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tile = offs[:, None] * SIZE + offs[None, :]
    b = tl.load(b_ptr + tile)
    once = tl.dot(tl.load(a_ptr + tile), b)
    tl.store(c_ptr + tile, tl.dot(once.to(tl.float16), b))


@triton.jit
def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs * stride, tl.load(x_ptr + offs * stride, mask=offs < n), mask=offs < n)


@triton.jit
def copy_tile(source, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs[:, None] * SIZE + offs[None, :], source.load([0, 0]))


@triton.jit
def refuse(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1, "the block is not 1")


def on_meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(
    m: int, n: int, block_k: int, num_warps: int, num_stages: int,
    dtype: torch.dtype = torch.float16, precision: str = "ieee",
) -> Launch:  # fmt: skip
    args = {
        "a_ptr": on_meta(m, 4096, dtype=dtype), "b_ptr": on_meta(n, 4096, dtype=dtype),
        "c_ptr": on_meta(m, n, dtype=torch.float32), "bias_ptr": None, "K": 4096,
    }  # fmt: skip
    constants = {"M": m, "N": n, "BLOCK_K": block_k, "PRECISION": precision}
    return Launch(matmul, (1,), args, constants, num_warps, num_stages)


def planted() -> dict[str, Launch]:
    """Launches by what is to be found of them."""
    x, y = on_meta(4096), on_meta(4096)
    tile = on_meta(64, 64)
    return {
        "good": product(128, 128, 64, 8, 3),
        "spill": product(256, 256, 32, 4, 2),  # 512 accumulators for each of 128 threads
        "shared": product(128, 256, 128, 8, 4),  # three stages of 96 KB, or four
        "shared on sm_80": product(128, 256, 32, 8, 8),  # 7 * 24 KB there, 8 on sm_90
        "small": product(16, 64, 64, 4, 3),  # WGMMA takes 64 rows
        "tf32": product(64, 64, 32, 4, 3, torch.float32, "tf32"),
        "ieee": product(64, 64, 32, 8, 2, torch.float32, "ieee"),
        "no dot": Launch(
            copy, (1,), {"x_ptr": x, "y_ptr": y, "n": 4096, "stride": 1}, {"BLOCK": 1024}, 4, 1
        ),
        "descriptor": Launch(
            copy_tile, (1,), {"source": TensorDescriptor.from_tensor(tile, [64, 64]), "y_ptr": x},
            {"SIZE": 64}, 4, 1,
        ),
        "register operand": Launch(
            matmul_twice, (1,), {"a_ptr": tile, "b_ptr": tile, "c_ptr": tile}, {"SIZE": 64}, 4, 1
        ),
        "refused": Launch(refuse, (1,), {"x_ptr": x}, {"BLOCK": 2}, 4, 1),
    }  # fmt: skip


def inspect_planted() -> list[dict[str, Any]]:
    found = inspect_launches(
        [
            ("planted", name, launch, target)
            for name, launch in planted().items()
            for target in TARGETS
        ]
    )
    return [dataclasses.asdict(result) for result in found]


def disassembled() -> list[list[bool]]:
    """Whether kernels taken apart together are what each is by itself: two that differ, in
    either order, and one of them twice."""
    gpu = TARGETS["sm_90"].gpu
    cubins = [compile_launch(planted()[name], gpu).asm["cubin"] for name in ("good", "no dot")]
    alone = [without_addresses(*disassemble([cubin], 90)) for cubin in cubins]
    assert alone[0] != alone[1] and "HGMMA" in alone[0]
    return [
        [
            without_addresses(text) == alone[number]
            for number, text in zip(order, disassemble([cubins[n] for n in order], 90), strict=True)
        ]
        for order in ((0, 1), (1, 0), (0, 0, 1))
    ]


def without_addresses(listing: str) -> str:
    """Jumps lead to addresses, too."""
    return re.sub(r"0x[0-9a-f]+|/\*[0-9a-f]+\*/", "", listing)


def inspect_shipped() -> list[dict[str, Any]]:
    """Every launch for sm_90, every fourth for the rest: about two minutes on two cores, and then
    Triton's cache has them. `resfuse inspect` does all."""
    todo = [
        job for job in jobs(list(KERNELS), DEFAULT_TARGETS) if job[2] == "sm_90" or job[1] % 4 == 0
    ]
    return [dataclasses.asdict(result) for result in inspect_jobs(todo)]


def specialised() -> dict[str, str]:
    """The Triton IR of `copy` with sizes that divide by 16, are one, or neither."""
    launch, gpu = planted()["no dot"], TARGETS["sm_90"].gpu
    odd = dataclasses.replace(launch, args={**launch.args, "n": 4095, "stride": 3})
    return {
        name: compile_launch(each, gpu).asm["ttir"]
        for name, each in (("even", launch), ("odd", odd))
    }


def inspect_without_stages() -> list[dict[str, Any]]:
    """A launch that Triton's cache has whole, and then no more of than its binary."""
    launch = planted()["good"]
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        whole = inspect_launch("planted", "good", launch, "sm_90")
        (group,) = Path(cache).glob("*/__grp__*.json")
        group.write_bytes(relative(group.read_bytes()))
        move_into_cache(Path(cache), Path(cache))
        assert "ttgir" not in compile_launch(launch, TARGETS["sm_90"].gpu).asm
        again = inspect_launch("planted", "good", launch, "sm_90")
        assert not triton.knobs.compilation.always_compile
    return [dataclasses.asdict(result) for result in (whole, again)]


def compiled(function: str) -> Any:
    """What a function of this file returns in a process that compiles kernels."""
    paths = [
        *(str(Path(__file__).parents[2] / f) for f in ("helpers", "helpers/networks")),
        str(Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    script = f"import json, test_inspect as t; print(json.dumps(t.{function}()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_shipped_launch_compiles_to_what_it_should() -> None:
    results = [Inspection(**row) for row in compiled("inspect_shipped")]
    assert {result.kernel for result in results} == set(KERNELS)
    assert {result.target for result in results} == set(DEFAULT_TARGETS)
    wrong = [
        f"{result.kernel} {result.label} for {result.target}: {problem}"
        for result in results
        for problem in problems(result)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def defects() -> dict[tuple[str, str], Inspection]:
    results = [Inspection(**row) for row in compiled("inspect_planted")]
    return {(result.label, result.target): result for result in results}


def test_planted_defects_are_found(defects: dict[tuple[str, str], Inspection]) -> None:
    def said(label: str, target: str) -> str:
        return "; ".join(problems(defects[label, target]))

    for target in DEFAULT_TARGETS:
        assert said("good", target) == ""
        assert "KB of shared memory, " + target in said("shared", target)
        assert said("refused", target).startswith("does not compile: ")
    for target in ("sm_80", "sm_90"):  # sm_100 accumulates outside the registers
        assert said("spill", target).startswith("spills ")
    assert "shared memory, sm_80 has 163 KB" in said("shared on sm_80", "sm_80")
    assert "shared memory" not in said("shared on sm_80", "sm_90")
    assert said("small", "sm_80") == ""
    for target in ("sm_90", "sm_100"):
        assert f"1 dots miss {target}'s tensor cores (0 instructions" in said("small", target)
    assert "KB of shared memory, gfx942 has 64 KB" in said("shared", "gfx942")


def test_what_is_no_defect(defects: dict[tuple[str, str], Inspection]) -> None:
    for target in DEFAULT_TARGETS:  # AMD's tensor cores do ieee fp32
        assert defects["ieee", target].tensor_core_instructions == 0
    for target in TARGETS:
        for label in ("ieee", "no dot", "register operand"):
            assert problems(defects[label, target]) == []
        assert defects["ieee", target].dots == defects["no dot", target].dots == 0
        assert defects["tf32", target].dots == 1
        assert defects["tf32", target].tensor_core_instructions > 0
        assert not defects["descriptor", target].error


def test_register_operands_of_an_old_assembler(
    defects: dict[tuple[str, str], Inspection],
) -> None:
    chained = defects["register operand", "sm_90"]
    assert chained.register_operands == 1
    assert has_risky_operands(dataclasses.replace(chained, assembler_version="12.9"))
    assert not has_risky_operands(dataclasses.replace(chained, assembler_version="13.3"))
    assert not has_risky_operands(defects["good", "sm_90"])  # its operands lie in shared memory
    assert not has_risky_operands(defects["register operand", "sm_80"])


def test_kernels_disassembled_together_are_what_each_is_alone() -> None:
    assert compiled("disassembled") == [[True, True], [True, True], [True, True, True]]


def test_what_is_no_cubin_is_not_disassembled() -> None:
    with pytest.raises(ValueError, match="no cubin"):
        disassemble([b"not an ELF file"], 90)


def test_arguments_are_specialised_as_for_a_launch() -> None:
    ir = compiled("specialised")
    signature = {name: text.split("tt.func")[1].split("{\n")[0] for name, text in ir.items()}
    assert signature["even"].count("tt.divisibility = 16") == 3  # two pointers and n
    assert "%stride" not in signature["even"]  # one is a constant
    assert signature["odd"].count("tt.divisibility = 16") == 2
    assert "%stride: i32" in signature["odd"]


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared_kib", "columns", "ctas"),
    [
        ("sm_90", 4, 32, 0, 0, 16),  # 64 warps
        ("sm_90", 1, 16, 0, 0, 32),  # 32 CTAs
        ("sm_90", 4, 128, 0, 0, 4),  # 65,536 registers
        ("sm_90", 4, 129, 0, 0, 3),  # given out 8 a thread at a time
        ("sm_90", 8, 255, 0, 0, 1),
        ("sm_90", 4, 32, 113, 0, 2),  # 228 KB, of which 1 KB a CTA is the system's
        ("sm_90", 4, 32, 114, 0, 1),
        ("sm_90", 4, 32, 228, 0, 0),
        ("sm_80", 4, 32, 81, 0, 2),
        ("sm_80", 4, 32, 82, 0, 1),
        ("sm_100", 4, 32, 0, 256, 2),  # 512 columns of tensor memory
        ("gfx942", 8, 128, 0, 0, 2),  # 512 vector registers: four waves on each of four SIMDs
        ("gfx942", 8, 64, 33, 0, 1),
    ],
)
def test_occupancy(
    target: str, num_warps: int, registers: int, shared_kib: int, columns: int, ctas: int
) -> None:
    held = resident_ctas(TARGETS[target], num_warps, registers, shared_kib << 10, columns)
    assert held == ctas


FINE = Inspection(
    "conv", "tile", "sm_90", 8, 3, registers=168, shared_bytes=227 << 10, dots=1,
    tensor_core_instructions=16, ctas=1, warps=8, assembler="/bin/ptxas", assembler_version="12.9",
)  # fmt: skip


def test_the_limits_themselves_are_no_problem() -> None:
    assert problems(FINE) == []
    assert problems(dataclasses.replace(FINE, tensor_memory_columns=512)) == []
    for changed, said in (
        ({"shared_bytes": (227 << 10) + 1}, "227 KB of shared memory, sm_90 has 227 KB"),
        ({"tensor_memory_columns": 513}, "513 columns of tensor memory"),
        ({"spill_stores": 1}, "spills 0 bytes a thread, 1 stores"),
        ({"spill_bytes": 8}, "spills 8 bytes a thread, 0 stores"),
        ({"slow_dots": 1}, "1 dots miss sm_90's tensor cores (16 instructions"),
        ({"tensor_core_instructions": 0}, "1 dots miss sm_90's tensor cores (0 instructions"),
    ):
        assert said in problems(dataclasses.replace(FINE, **changed))[0]


def run_command(
    results: list[Inspection], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> int:
    """`resfuse inspect` with the compiler's answers given."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "require_compiler", lambda: None)
    monkeypatch.setattr(module, "inspect", lambda *_: iter(results))
    return main(["inspect", *arguments])


def test_the_command_shows_problems_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = dataclasses.replace(FINE, label="bad", spill_bytes=24, spill_stores=6)
    file = tmp_path / "inspected.csv"
    assert run_command([FINE, bad], ["--csv", str(file)], monkeypatch) == 1
    shown = capsys.readouterr().out
    assert "spills 24 bytes a thread, 6 stores" in shown
    assert "2 configurations, 1 with problems; assembled by /bin/ptxas 12.9" in shown
    assert "Warning" not in shown
    with file.open() as rows:
        fine_row, bad_row = csv.DictReader(rows)
    assert (fine_row["registers"], fine_row["problems"]) == ("168", "")
    assert bad_row["problems"] == "spills 24 bytes a thread, 6 stores"


def test_the_command_warns_of_an_old_assembler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([dataclasses.replace(FINE, register_operands=2)], [], monkeypatch) == 0
    assert "Warning: 1 of them feed Hopper's tensor cores from registers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernel", "conv9"], "--kernel: unknown name 'conv9'; "),
        (["--target", "sm_91"], "--target: unknown name 'sm_91'; did you mean sm_90"),
        (["--csv", "nowhere/at/all.csv"], "--csv: nowhere/at is no folder"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_nothing_is_compiled_where_kernels_are_interpreted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "interpreting", lambda: True)
    assert main(["inspect"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        inspect_launch("conv", "tile", planted()["good"], "sm_90")


def test_a_kernel_that_was_carried_here_is_inspected_as_any_other() -> None:
    """Its cache has no intermediate stages; they are made again."""
    whole, again = compiled("inspect_without_stages")
    assert whole == again and whole["dots"] and not whole["error"]
