"""`resfuse doctor`: with all there is, and with packages, compiler or folders taken away."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resfuse.bench.cli import main
from resfuse.bench.common.finding import BROKEN, NOTE, Finding, Part, looked
from resfuse.bench.doctor import doctor_page, processors, software
from resfuse.bench.measuring.probes.noise import judged

pytestmark = pytest.mark.slow

RUN = (
    "import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
    "from resfuse.bench.cli import main\n"
    "sys.exit(main(['doctor', '--device', 'cpu', '--results', {results!r}]))"
)


def examined(folder: Path, *hidden: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import some packages."""
    code = RUN.format(hidden=list(hidden), results=str(folder / "r"))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def line(said: str, name: str) -> str:
    return next(one for one in said.splitlines() if one[2:].split(" ")[0] == name)


def test_a_whole_installation_is_fine_and_fits_a_page_and_a_half(tmp_path: Path) -> None:
    done = examined(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout  # plain where it is piped
    assert len(done.stdout.splitlines()) <= 60
    for title in ("Device", "Software", "Arithmetic", "Backends", "Noise", "Results"):
        assert title in done.stdout.splitlines()
    assert "eager, compiled" in line(done.stdout, "will")
    assert line(done.stdout, "cudnn_fused").startswith("! ")
    assert "believe speed-ups beyond 1." in line(done.stdout, "believable")
    assert done.stdout.splitlines()[-1].startswith("All that `make bench` needs is here.")
    assert not (tmp_path / "r").exists()  # it only looks


def test_optional_packages_that_are_missing_cost_their_backends(tmp_path: Path) -> None:
    done = examined(tmp_path, "triton", "onnxruntime", "openvino")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "our GPU kernels" in line(done.stdout, "triton")
    assert "pip install 'resfuse[bench]'" in line(done.stdout, "onnxrt")
    assert "pip install 'resfuse[openvino]'" in done.stdout
    assert "onnxrt," not in line(done.stdout, "will")
    assert "ptxas" not in done.stdout


def test_without_a_compiler_it_says_so_and_fails(tmp_path: Path) -> None:
    done = examined(tmp_path, PATH=str(tmp_path), CXX="", RESFUSE_CACHE_DIR=str(tmp_path / "c"))
    assert done.returncode == 1, done.stdout + done.stderr
    broken = line(done.stdout, "native")
    assert broken.startswith("x ") and "no C++ compiler" in broken
    assert "torch.compile finds no C++ compiler" in line(done.stdout, "compiled")
    assert "cannot do its work here: see native steps" in done.stdout.splitlines()[-1]


def test_the_warning_for_hopper_and_a_ptxas_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    inspect = importlib.import_module("resfuse.kernels.gpu.inspect.inspect")
    (found,) = software.ptxas()
    assert found.state == "ok"  # no GPU at hand is miscompiled for
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    told = software.ptxas()
    old = not inspect.is_sound(told[0].value.split(",")[0])
    assert [one.state for one in told] == (["ok", NOTE] if old else ["ok"])
    assert not old or "set TRITON_PTXAS_PATH to one from 13.3 on" in told[1].value
    fake = tmp_path / "ptxas"
    fake.write_text("#!/bin/sh\necho no compiler\n")
    fake.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(fake))
    assert Finding("", f"TRITON_PTXAS_PATH is {fake}, which is no ptxas", NOTE) in software.ptxas()


@pytest.mark.parametrize("package", ["torch", "rich"])
def test_needed_packages_that_are_missing_fail(package: str, tmp_path: Path) -> None:
    done = examined(tmp_path, package)
    assert done.returncode == 1, done.stdout + done.stderr
    assert line(done.stdout, package).startswith("x ")
    assert f"pip install {package}" in line(done.stdout, package)
    assert "Traceback" not in done.stderr


def test_results_that_cannot_be_written_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--device", "cpu", "--results", str(tmp_path / "file/results")]) == 1
    said = capsys.readouterr().out
    assert "cannot be written: use another --results folder" in line(said, "results")


def test_a_device_that_is_not_here_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "gpu"]) == 2
    assert "argument --device: 'gpu' cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "files", "granted"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, 0.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, None),
        ("2:cpu,cpuacct:/x\n0::/", {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                                    "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 3.0),
        ("2:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("1:memory:/x", {"memory/x/cpu.max": "100 100000"}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_limits_of_cgroups(
    own: str, files: dict[str, str], granted: float | None, tmp_path: Path
) -> None:
    """Both versions; an ancestor's limit holds, too."""
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert processors.cgroup_cores(tmp_path / "fs", tmp_path / "own") == granted
    found = processors.cores(tmp_path / "fs", tmp_path / "own")
    assert (found.state == NOTE) == (granted is not None and granted < len(os.sched_getaffinity(0)))


def test_what_may_be_believed_follows_from_the_spread() -> None:
    still = judged([1.0] * 20, [1.0] * 20)
    assert still[1].state == "ok" and "believe speed-ups beyond 1.01x" in still[1].value
    first, second = [1.0, 1.3] * 10, [1.3, 1.0] * 10
    loud = judged(first, second)
    assert loud[1].state == NOTE
    assert "p90 13 % above the median" in loud[0].value  # of 1.0 and 1.3, 1.15 in the middle
    assert "believe speed-ups beyond 1.30x" in loud[1].value


def test_a_part_that_cannot_be_looked_at_is_a_line() -> None:
    def look() -> list[Finding]:
        raise OSError("libcuda.so.1 is damaged\nand more")

    assert looked(Part("Device", look)) == [
        Finding("error", "OSError: libcuda.so.1 is damaged", BROKEN)
    ]


def test_long_findings_are_folded_below_their_column() -> None:
    told = doctor_page.lines(Finding("name", " ".join(["word"] * 40), NOTE), 80)
    assert told[0].startswith("! name            word")
    assert all(len(one) <= 80 for one in told)
    assert all(one.startswith(" " * 18 + "word") for one in told[1:])
