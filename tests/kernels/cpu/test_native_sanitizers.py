"""The native library's tests once more under AddressSanitizer and UndefinedBehaviorSanitizer, in a
debug build, which asserts the preconditions of every step.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resfuse.kernels.cpu.library import NativeUnavailable, _compiler

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-O1",
    "--param=asan-instrumentation-with-call-threshold=0",  # checks inline take a third longer
    "-DRESFUSE_DEBUG",
)
# Undefined behaviour ends the process without a word: a fifth less to compile.
QUICK = (*FLAGS, "-fsanitize-undefined-trap-on-error")
TESTS = (
    "test_native_pools.py",
    "test_native_norms.py",
    "test_native_strips.py",
    "test_native_chain.py",
    "test_native_guards.py::test_convolutions",
    "test_native_tails.py",
    "test_native_convolution.py::test_every_way_to_compute_a_convolution_is_right",
    "test_native_convolution.py::test_blocks_smaller_than_the_map",
    "test_native_convolution.py::test_any_number_of_threads",
    "test_conv_program_bf16.py",
    "test_native_bf16.py::test_every_way_to_compute_a_convolution_rounds_once",
    "test_native_bf16.py::test_a_chain_answers_as_its_convolutions_one_by_one",
    "test_native_bf16.py::test_strips_answer_as_what_they_fuse_one_by_one",
    "test_native_bf16.py::test_batch_norms_and_gates",
    "test_native_bf16.py::test_means_and_average_pools",
    "test_native_bf16.py::test_a_stem_reads_an_image_of_any_channels_in_pairs",
    "test_native_bf16.py::test_float32_is_rounded_to_the_nearest_and_halfway_to_the_even",
    "int8/test_native_int8.py::test_every_way_to_compute_a_convolution_gives_the_twins_bits",
    "int8/test_native_int8.py::test_channels_that_fill_no_unit",
    "int8/test_native_int8.py::test_outputs_are_clipped_at_both_ends",
    "int8/test_native_int8.py::test_the_largest_sums_are_exact",
    "int8/test_native_int8_maps.py",
    "int8/test_native_int8_fused.py",
    "test_native_team.py::test_callers_in_several_threads_get_what_each_gets_alone",
)
# One library for all: in every test its threads are held up at times, which is what
# test_native_team's own library is for. Two took half a minute more to compile.
RUN = """
import os, sys, pytest
del os.environ["LD_PRELOAD"]  # what is started from here, compilers too, is not looked at
from resfuse.kernels.cpu import library
plain, flags = library.library, tuple(sys.argv[1].split())
def sanitized(architecture="native", *further):
    own = [flag for flag in further if flag not in flags]  # -O1 of some: one library all the same
    return plain(architecture, *dict.fromkeys(["-DRESFUSE_DISTURBED", *own, *flags]))
library.library = sanitized
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def sanitizer(compiler: str) -> str:
    """AddressSanitizer's library, which has to be loaded first, and that whose throw it watches."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = [compiler, f"-print-file-name={name}"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if not Path(said).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        found.append(str(Path(said).resolve()))
    return " ".join(found)


def test_native_steps_stay_in_their_memory_and_within_the_language(tmp_path: Path) -> None:
    try:
        compiler = _compiler()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer(compiler),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }

    def run(flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RUN, " ".join(flags), *(str(HERE / test) for test in TESTS)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = run(QUICK)
    if done.returncode != 0:
        said = run(FLAGS)  # where, and why
        pytest.fail("".join(f"{r.stdout}\n{r.stderr}"[-4000:] for r in (done, said)))
    assert "passed" in done.stdout
