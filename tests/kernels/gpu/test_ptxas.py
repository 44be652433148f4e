"""Which ptxas is found and preferred, and that `resfuse gpu-plan` tells its subprocesses.

Those that are looked for are scripts that say a version, as the real one does; Triton's is real.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.probes import machine
from resfuse.kernels.gpu.inspect import ptxas
from resfuse.kernels.gpu.inspect.ptxas import (
    VARIABLE,
    Ptxas,
    best,
    find,
    in_use,
    is_sound,
    version_of,
)
from resfuse.tools.gpu_plan import assembler

SAYS = (
    "ptxas: NVIDIA (R) Ptx optimizing assembler\\n"
    "Cuda compilation tools, release {short}, V{version}\\nBuild cuda_{version}\\n"
)


def fake(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    short = version.rpartition(".")[0]
    path.write_text(f'#!/bin/sh\nprintf "{SAYS.format(short=short, version=version)}"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `nvidia` folder of site-packages in the place of this machine's."""
    folders = ptxas._folders_of

    def there(package: str) -> list[Path]:
        return [tmp_path / "nvidia"] if package == "nvidia" else folders(package)

    monkeypatch.setattr(ptxas, "_folders_of", there)
    return tmp_path / "nvidia"


def test_triton_brings_ones_that_run(wheels: Path) -> None:
    own = find({})
    assert {p.origin for p in own} == {"Triton"}
    assert [Path(p.path).name for p in own] == ["ptxas", "ptxas-blackwell"]
    assert all(version_of(p.path) == p.version and p.version.count(".") == 2 for p in own)
    assert in_use({}) == own[0]


def test_all_places_are_searched_in_order(wheels: Path, tmp_path: Path) -> None:
    named = fake(tmp_path / "mine/ptxas", "12.0.1")
    wheel = fake(wheels / "cu13/bin/ptxas", "13.3.73")
    home = fake(tmp_path / "cuda/bin/ptxas", "13.1.5")
    path = fake(tmp_path / "bin/ptxas", "13.4.2")
    came = fake(tmp_path / "cache/carried/ptxas", "13.3.2")
    there = {VARIABLE: str(named), "CUDA_HOME": str(home.parents[1]), "PATH": str(path.parent)}
    there["TRITON_CACHE_DIR"] = str(came.parents[1])
    found = find(there)
    assert [(p.path, p.version, p.origin) for p in found[:5]] == [
        (str(named), "12.0.1", VARIABLE),
        (str(came), "13.3.2", "the carried kernels"),
        (str(wheel), "13.3.73", "the wheel in nvidia/cu13"),
        (str(home), "13.1.5", "CUDA_HOME"),
        (str(path), "13.4.2", "the PATH"),
    ]
    assert best(found) == found[0]  # the user's word, sound or not
    assert "may miscompile for Hopper" in found[0].told()
    assert in_use(there) == found[0]
    assert in_use({**there, VARIABLE: str(wheel)}) == found[2]  # told where it came from
    del there[VARIABLE]
    chosen = best(find(there))
    assert chosen is not None and chosen.origin == "the PATH"  # the newest


def one(version: str, origin: str) -> Ptxas:
    return Ptxas(f"/{origin}", version, origin)


OLD, NEW = one("12.9.86", "Triton"), one("13.3.33", "Triton")
TEN = one("13.10.1", "the PATH")


@pytest.mark.parametrize(
    "found, major, wins",
    [
        ([], None, None),
        ([OLD], None, OLD),
        ([one("12.9.99", "the PATH"), OLD], None, OLD),  # neither is sound: as it always was
        ([one("12.9.99", "the PATH"), OLD, NEW], None, NEW),
        ([one("13.3.33", "CUDA_HOME"), OLD, NEW], None, one("13.3.33", "CUDA_HOME")),
        ([one("13.9.1", "CUDA_HOME"), TEN], None, TEN),  # by numbers, not letters
        ([one("14.0.1", "the PATH"), OLD, NEW], 13, NEW),  # the driver would not load its code
        ([one("14.0.1", "the PATH"), OLD, NEW], 12, OLD),
        ([one("14.0.1", VARIABLE), OLD, NEW], 12, one("14.0.1", VARIABLE)),
    ],
)  # fmt: skip
def test_the_newest_sound_one_is_best(
    found: list[Ptxas], major: int | None, wins: Ptxas | None
) -> None:
    assert best(found, major) == wins


@pytest.mark.parametrize(
    "version, sound", [("12.9.86", False), ("13.2.99", False), ("13.3.0", True), ("14.0", True)]
)
def test_sound_versions(version: str, sound: bool) -> None:
    assert is_sound(version) is sound


def test_what_does_not_run_is_none(wheels: Path, tmp_path: Path) -> None:
    broken = wheels / "cu13/bin/ptxas"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\x7fELF and nothing else")
    broken.chmod(0o755)
    silent = tmp_path / "cuda/bin/ptxas"
    silent.parent.mkdir(parents=True)
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o755)
    assert {p.origin for p in find({"CUDA_HOME": str(tmp_path / "cuda")})} == {"Triton"}
    with pytest.raises(ValueError, match=f"{VARIABLE}: .*cu13.* is no ptxas that runs"):
        find({VARIABLE: str(broken)})
    assert in_use({VARIABLE: str(broken)}) is None


# What the plan makes of it


def test_subprocesses_of_the_plan_are_told(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = fake(wheels / "cu13/bin/ptxas", "99.9.9")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(assembler, "driver_major", lambda: None)
    read = [sys.executable, "-c", f"import os; print(os.environ['{VARIABLE}'])"]
    with assembler.chosen() as said:
        assert subprocess.check_output(read, text=True).strip() == str(newest)
        assert machine._ptxas() == {"ptxas": "99.9.9", "ptxas_from": "the wheel in nvidia/cu13"}
    assert VARIABLE not in os.environ
    assert said == f"Kernels are assembled by ptxas 99.9.9 of the wheel in nvidia/cu13: {newest}"


def test_the_users_own_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fake(tmp_path / "ptxas", "12.1.1")
    monkeypatch.setenv(VARIABLE, str(own))
    with assembler.chosen() as said:
        assert os.environ[VARIABLE] == str(own)
        assert machine._ptxas() == {"ptxas": "12.1.1", "ptxas_from": VARIABLE}
    assert os.environ[VARIABLE] == str(own)
    assert "12.1.1" in said and "may miscompile for Hopper" in said


def test_it_is_put_back_when_the_plan_fails(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RuntimeError), assembler.chosen():
        assert VARIABLE in os.environ
        raise RuntimeError
    assert VARIABLE not in os.environ


def test_a_path_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="is no ptxas that runs"), assembler.chosen():
        pass
    assert main(["gpu-plan", "--dry-run", "--results", str(tmp_path / "r")]) == 2
    assert f"resfuse: error: {VARIABLE}: " in capsys.readouterr().err
