"""Kernels compiled ahead, packed and unpacked: what Triton then compiles is counted in a process of
its own, under the stand-in driver. The network is a tiny one, its launches a few of each kernel."""

import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from torch import nn

from resfuse.bench.common.errors import UsageError
from resfuse.kernels.gpu.common import c_launchers
from resfuse.kernels.gpu.inspect import ptxas
from resfuse.tools.gpu_plan import carried, carried_archive, carried_kernels
from resfuse.tools.gpu_plan.carried_archive import Foreign, extract
from resfuse.tools.gpu_plan.carried_manifest import Facts, Manifest, Wanted, differences

pytestmark = pytest.mark.slow

WANTED = Wanted("resnet18", 2, "float16")
HAS_LAUNCHERS = hasattr(c_launchers.nvidia, "make_launcher")
KEY = "A" * 52
INSTEAD = "kernels compile here instead, which costs only time"


def tiny(*_: object, **given: object) -> nn.Module:
    """A stem, a 3x3 with a residual's shape, and a 1x1, of 32 pixels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 1), nn.BatchNorm2d(128), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(str(given.get("device", "cpu")))


def few() -> None:
    """carried_kernels' program, for the tiny network and one in three of its launches."""
    every = carried_kernels.engine_launches
    carried_kernels.create = tiny  # type: ignore[assignment]
    carried_kernels.input_size = lambda name: 32  # type: ignore[assignment]
    carried_kernels.engine_launches = lambda one: iter(  # type: ignore[assignment]
        list(every(one))[::3]
    )
    carried_kernels.main(sys.argv[1:])


def stand_in_ptxas(path: Path, version: str) -> Path:
    """A program that says it is ptxas of some version, and has Triton's own assemble: it is older
    and refuses the PTX version of newer ones, of which our kernels need nothing."""
    own = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    path.parent.mkdir(parents=True, exist_ok=True)
    short = version.rpartition(".")[0]
    program = f"""
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <unistd.h>
        int main(int count, char **words) {{
            if (count == 2 && !strcmp(words[1], "--version"))
                return printf("Cuda compilation tools, release {short}, V{version}\\n") < 0;
            for (int i = 1; i < count; i++) {{
                char line[4096], *end = strrchr(words[i], '.');
                snprintf(line, 4096, "sed -i 's/^[.]version .*/.version 8.7/' '%s'", words[i]);
                if (end && !strcmp(end, ".ptx") && system(line)) return 1;
            }}
            return execv("{own}", words);
        }}"""
    command = ["gcc", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=program, text=True, check=True)
    return path


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """An archive, its Triton cache gone, and what `pack` said of it."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("made")
    patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    patch.setenv(ptxas.VARIABLE, str(stand_in_ptxas(folder / "ptxas", "13.3.73")))
    patch.setattr(carried, "KERNELS", ("-c", "import test_carried; test_carried.few()"))
    wheel = folder / "carried_example-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as written:
        written.writestr("carried_example.py", "ANSWER = 42\n")
    told = carried.pack(folder / "kernels.tar.xz", [WANTED], [wheel])
    shutil.rmtree(folder / "cache")
    patch.delenv("TRITON_CACHE_DIR")
    patch.delenv(ptxas.VARIABLE)
    return folder / "kernels.tar.xz", told


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def told_as(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_what_was_carried_is_compiled_no_more(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, told = made
    cache = tmp_path / "cache"
    said = carried.unpack(archive, cache)
    manifest = Manifest.loads((cache / "carried/manifest.json").read_text())
    launchers = f" and {manifest.launchers} launchers" if HAS_LAUNCHERS else ""
    held = f"{manifest.kernels} kernels{launchers} for resnet18:2:float16"
    assert said == f"The carried kernels fit this machine: {held}"
    assert told == f"{archive}: {archive.stat().st_size / 2**20:.1f} MB, {held}"
    assert manifest.kernels >= 8 and bool(manifest.launchers) == HAS_LAUNCHERS
    suffixes = {p.suffix for p in files_in(cache) if p.parent != cache / "carried"}
    assert suffixes - {".so", ".py"} == {".cubin", ".json"}  # what the compiler left between is not
    told_as(monkeypatch, carried.environment(cache))
    assert ptxas.find()[0].path == str(cache / "carried/ptxas")
    counted = carried.count([WANTED])
    assert counted.endswith(f"0 kernels and 0 launchers were not in {cache}")
    assert f"of {manifest.kernels} kernels and {manifest.launchers} launchers" in counted
    asked = [sys.executable, "-c", "import carried_example; print(carried_example.ANSWER)"]
    done = subprocess.run(asked, capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "42\n"


def test_a_kernel_that_is_missing_or_another_ptxas_costs_a_compilation(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`count` counts: it would say 0 of an empty cache, too, if it could not."""
    cache = tmp_path / "cache"
    carried.unpack(made[0], cache)
    shutil.rmtree(next(cache.glob("*/*.cubin")).parent)
    for library in cache.glob("*/__triton_launcher*"):
        library.unlink()
    told_as(monkeypatch, carried.environment(cache))
    kernels = Manifest.loads((cache / "carried/manifest.json").read_text()).launchers
    assert f": 1 kernels and {kernels} launchers were not" in carried.count([WANTED])


def test_packing_again_gives_the_same_bytes(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what was unpacked, in another folder: nothing of this machine is in it."""
    cache = tmp_path / "cache"
    carried.unpack(made[0], cache)
    told_as(monkeypatch, carried.environment(cache))
    wheel = next(made[0].parent.glob("*.whl"))
    carried.pack(tmp_path / "again.tar.xz", [WANTED], [wheel])
    assert (tmp_path / "again.tar.xz").read_bytes() == made[0].read_bytes()
    with lzma.open(made[0]) as content:
        assert str(made[0].parent).encode() not in content.read()


def changed(made: tuple[Path, str], to: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """The archive with another manifest."""
    stage = to / "stage"
    extract(made[0], stage)
    manifest = change(Manifest.loads((stage / "manifest.json").read_text()))
    files: dict[str, bytes | Path] = {str(p.relative_to(stage)): p for p in files_in(stage)}
    carried_archive.write(
        to / "other.tar.xz", {**files, "manifest.json": manifest.dumps().encode()}
    )
    return to / "other.tar.xz"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"sources": "0"}, "made from other sources, 0123, here"),
        ({"triton": "3.5.0", "triton_key": "0"}, "by triton 3.5.0, here 3."),
        ({"triton_key": "0"}, "by another build of triton 3."),
        ({"ptxas": "release 13.9, V13.9.1"}, "by ptxas V13.9.1, here V13.3.73"),
        ({"python": "3.13 .so"}, "for Python 3.13 .so, here 3."),
        ({"variables": {"TRITON_X": "1"}}, "with TRITON_X 1, here not set"),
    ],
)
def test_another_machine_or_other_sources_cost_only_time(
    facts: dict[str, object], said: str, made: tuple[Path, str], tmp_path: Path
) -> None:
    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, commit="0123", facts=replace(manifest.facts, **facts))

    told = carried.unpack(changed(made, tmp_path, change), tmp_path / "cache")
    assert told.startswith(f"The carried kernels do not all fit ({said}")
    assert told.endswith("): others are compiled here, which costs only time")
    assert told.count(";") == 0  # nothing else is different
    assert list((tmp_path / "cache").glob("*/*.cubin"))  # those of unchanged files are found


def test_nothing_differs_from_itself() -> None:
    here = Facts("1", "3.6.0", "2", "V13.3.73", "3.12", "2.11", 90, {})
    made_here = Manifest("c", [], 1, 1, here)
    assert differences(made_here, replace(here, torch="2.14"), "d") == []
    assert differences(made_here, replace(here, arch=80), "d") == ["for sm_90, here sm_80"]


def test_a_damaged_archive_leaves_nothing_behind(made: tuple[Path, str], tmp_path: Path) -> None:
    whole = made[0].read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    damaged = [whole[: len(whole) * part // 8] for part in range(8)] + [bytes(flipped), b"\0" * 999]
    for content in damaged:
        archive = tmp_path / "damaged.tar.xz"
        archive.write_bytes(content)
        told = carried.unpack(archive, tmp_path / "cache")
        assert told.startswith(f"{archive} is no whole archive of carried kernels (")
        assert told.endswith(f"): {INSTEAD}") and "\n" not in told
        assert list((tmp_path / "cache").iterdir()) == []


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../evil"),
        tarfile.TarInfo("cache/../../../evil"),
        tarfile.TarInfo(f"cache/{KEY}/../../../evil"),
        tarfile.TarInfo(f"cache/{KEY}/.."),
        tarfile.TarInfo("wheels/../../evil.whl"),
        tarfile.TarInfo("/tmp/evil"),
        tarfile.TarInfo("evil"),
        link(f"cache/{KEY}/a.json", tarfile.SYMTYPE),
        link("ptxas", tarfile.LNKTYPE),
        link(f"cache/{KEY}/a.json", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_nothing_is_written_outside(member: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "evil.tar.xz", (member, b""))
    before = files_in(tmp_path)
    told = carried.unpack(archive, tmp_path / "deep/cache")
    assert f"it holds {member.name!r}" in told and told.endswith(INSTEAD)
    assert files_in(tmp_path) == before
    assert not Path("/tmp/evil").exists()


def test_a_link_in_the_cache_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    stage, cache = tmp_path / "stage", tmp_path / "cache"
    (stage / KEY).mkdir(parents=True)
    (stage / KEY / "a.json").write_text("{}")
    cache.mkdir()
    (cache / KEY).symlink_to(outside)
    carried_archive.move_into_cache(stage, cache)
    assert list(outside.iterdir()) == []


def test_other_archives_are_told_from_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    empty = tar_of(tmp_path / "empty.tar.xz")
    assert "it has no manifest" in carried.unpack(empty, cache)
    for text in (b"", b"[]", b"{}", b'{"facts": {}}', b"\xff"):
        other = tar_of(tmp_path / "other.tar.xz", (tarfile.TarInfo("manifest.json"), text))
        assert "is no whole archive" in carried.unpack(other, cache)
    assert "No such file" in carried.unpack(tmp_path / "missing.tar.xz", cache)
    monkeypatch.setattr(carried_archive, "MOST_BYTES", 10)
    large = tar_of(tmp_path / "large.tar.xz", (tarfile.TarInfo("manifest.json"), b" " * 11))
    with pytest.raises(Foreign, match="unpacks to more"):
        extract(large, tmp_path / "stage")


def test_a_target_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = carried.unpack(tmp_path / "any.tar.xz", tmp_path / "file/cache")
    assert told == (
        f"Carried kernels cannot be put into {tmp_path / 'file/cache'} (Not a directory): {INSTEAD}"
    )


def test_an_engine_in_int8_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed on a network without numbers, hence without ranges."""
    monkeypatch.setattr(carried_kernels, "create", tiny)
    monkeypatch.setattr(carried_kernels, "input_size", lambda name: 32)
    found = list(carried_kernels.engine_launches(Wanted.parse("resnet18:2:int8")))
    assert {launch.kernel.__name__ for launch in found} == {
        "conv_int8_kernel", "conv1x1_int8_kernel", "convert_int8_kernel", "pool_int8_kernel"
    }  # fmt: skip
    assert all(launch.device.type == "meta" for launch in found)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_target_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    told = carried.unpack(tmp_path / "any.tar.xz", tmp_path)
    assert "(Permission denied)" in told and told.endswith(INSTEAD)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert carried.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("carried: error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pack"], "required"),
        (["pack", "out.tar.xz", "resnet50"], "'resnet50' is not of the form resnet50:256:float16"),
        (["pack", "out.tar.xz", "resnet50:0:float16"], "is not of the form"),
        (["pack", "out.tar.xz", "resnet51:1:float16"], "there is no network 'resnet51'"),
        (["pack", "out.tar.xz", "resnet50:1:float8"], "accepted: float16, bfloat16, float32"),
        (["count", "resnet50:1"], "dtype ''"),
        (["repack"], "invalid choice"),
    ],
)
def test_slips_in_a_command_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(arguments, capsys)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_slips_in_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def packing(out: str, *more: str) -> str:
        return error_of(["pack", str(tmp_path / out), "resnet18:1:float16", *more], capsys)

    old = stand_in_ptxas(tmp_path / "old/ptxas", "12.9.86")
    monkeypatch.setenv(ptxas.VARIABLE, str(old))
    assert "want ptxas 13.3 or newer, here is ptxas 12.9.86" in packing("out.tar.xz")
    monkeypatch.setenv(ptxas.VARIABLE, str(tmp_path / "none"))
    assert "is no ptxas that runs" in packing("out.tar.xz")
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\necho "release 13.3, V13.3.73"\n')
    script.chmod(0o755)
    monkeypatch.setenv(ptxas.VARIABLE, str(script))
    assert "is a script that starts ptxas elsewhere" in packing("out.tar.xz")
    monkeypatch.setenv(ptxas.VARIABLE, str(stand_in_ptxas(tmp_path / "new/ptxas", "13.3.73")))
    assert "cannot be written" in packing("no/folder/out.tar.xz")
    assert "is no wheel" in packing("out.tar.xz", "--wheel", str(tmp_path / "missing.whl"))
    assert "is no wheel" in packing("out.tar.xz", "--wheel", str(script))
    monkeypatch.setattr(carried, "KERNELS", ("-c", "raise SystemExit(3)"))
    assert "ended with code 3" in packing("out.tar.xz")
    with pytest.raises(UsageError, match="nothing to pack"):
        carried.pack(tmp_path / "out.tar.xz", [])
    made = {
        "facts": vars(Facts("", "", "", "", "", "", 90, {})), "kernels": 0, "launchers": 0,
        "files": [], "failed": ["conv_kernel: OutOfResources"],
    }  # fmt: skip
    monkeypatch.setattr(carried, "KERNELS", ("-c", f"print({json.dumps(made)!r})"))
    told = carried.pack(tmp_path / "out.tar.xz", [WANTED])
    assert told.endswith(", 1 launches that do not compile left out")
    assert "conv_kernel: OutOfResources" in capsys.readouterr().err
    monkeypatch.setattr(carried, "KERNELS", ("-c", f"print({json.dumps(made | {'failed': []})!r})"))
    monkeypatch.setattr(carried_archive, "LIMIT_BYTES", 100)
    assert "more than the 0.0 MB a lent machine takes" in packing("out.tar.xz")
    assert not (tmp_path / "out.tar.xz").exists()
