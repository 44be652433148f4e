"""Kernels compiled ahead without a GPU, packed, and used on the machine that has one.

    python -m resfuse.tools.gpu_plan.carried pack .gpu/kernels.tar.xz resnet50:256:float16 \\
        resnet50:1:float16 resnet50:256:int8 resnet50:1:int8
    python -m resfuse.tools.gpu_plan.carried unpack .gpu/kernels.tar.xz ~/.triton/cache
    python -m resfuse.tools.gpu_plan.carried count resnet50:256:float16

An engine of ResNet-50 compiles some 800 kernels, five minutes of a core's time, of which a machine
that is lent for ten has none to spare. Triton's cache knows a kernel by what it was compiled from
and by, not by the machine: see carried_manifest.py. So the archive is made in the environment it is
for (the same Python, triton and ptxas) and last, from the sources that travel. One that is stale
costs only the time to compile. `count` says what Triton's cache still lacks for a network.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.probes import machine
from resfuse.kernels.gpu.inspect import ptxas
from resfuse.tools.gpu_plan import carried_archive as archives
from resfuse.tools.gpu_plan.carried_manifest import Facts, Manifest, Wanted, differences, facts_here

FOLDER = ptxas.CARRIED.parent  # in Triton's cache: what is no kernel
PACKAGES = "packages"  # in it: what the wheels held
KERNELS = ("-m", "resfuse.tools.gpu_plan.carried_kernels")  # the program that compiles
_ELF = b"\x7fELF"
_INSTEAD = "kernels compile here instead, which costs only time"


def pack(out: Path, wanted: Sequence[Wanted], wheels: Sequence[Path] = ()) -> str:
    """Compiles what an engine's build of each network would measure and what `fused` launches, for
    an H200, with this environment's Triton and the best ptxas here, and packs it with that ptxas.

    Triton's cache (TRITON_CACHE_DIR) keeps the kernels, so that packing again takes seconds.

    Args:
        wheels: packages that travel along.

    Returns:
        What is in the archive and its size, in a sentence.

    Raises:
        UsageError: nothing is wanted; there is no sound ptxas here; a wheel is none; the archive
            cannot be written or is larger than a lent machine takes.
    """
    if not wanted:
        raise UsageError("nothing to pack: name networks as in resnet50:256:float16")
    assembler = _sound_ptxas()
    for wheel in wheels:
        if wheel.suffix != ".whl" or not zipfile.is_zipfile(wheel):
            raise UsageError(f"argument --wheel: {wheel} is no wheel")
    _require_writable(out)
    made = _run("build", wanted, {ptxas.VARIABLE: assembler.path})
    manifest = Manifest(
        machine.commit(), [str(one) for one in wanted], made["kernels"], made["launchers"],
        Facts(**made["facts"]),
    )  # fmt: skip
    files: dict[str, bytes | Path] = {archives.MANIFEST: manifest.dumps().encode()}
    files[archives.PTXAS] = Path(assembler.path)
    files |= {f"{archives.WHEELS}/{wheel.name}": wheel for wheel in wheels}
    for name in made["files"]:
        path = cache_folder() / name
        group = archives.is_group(path.name)
        content = archives.relative(path.read_bytes()) if group else path
        files[f"{archives.CACHE}/{name}"] = content
    try:
        archives.write(out, files)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}") from None
    size = out.stat().st_size
    if size > archives.LIMIT_BYTES:
        out.unlink()
        raise UsageError(
            f"{out} has {_mb(size)}, more than the {_mb(archives.LIMIT_BYTES)} a lent machine "
            "takes: pack fewer networks"
        )
    failed = f", {len(made['failed'])} launches that do not compile left out" * any(made["failed"])
    return f"{out}: {_mb(size)}, {_held(manifest)}{failed}"


def unpack(archive: Path, to: Path) -> str:
    """Puts carried kernels into a folder, which is to be Triton's cache: TRITON_CACHE_DIR.

    A kernel that does not fit is one that Triton does not find, so whatever the archive is, nothing
    but time is lost. Nothing is written outside of `to`.

    Returns:
        Whether they fit this machine, and what is different if not, in a sentence.
    """
    stage: Path | None = None
    try:
        to.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=to))
    except OSError as error:
        return f"Carried kernels cannot be put into {to} ({error.strerror or error}): {_INSTEAD}"
    try:
        archives.extract(archive, stage)
        manifest = Manifest.loads((stage / archives.MANIFEST).read_text())
        _install(stage, to)
        return _fit(manifest, to)
    except Exception as error:  # a file from elsewhere: whatever may be the matter with it
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"{archive} is no whole archive of carried kernels ({said}): {_INSTEAD}"
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def environment(cache: Path) -> dict[str, str]:
    """What processes are to be told that use what was unpacked into `cache`: the cache, its ptxas,
    and where the packages of its wheels are imported from."""
    told = {"TRITON_CACHE_DIR": str(cache)}
    if ptxas.version_of(cache / ptxas.CARRIED) is not None:
        told[ptxas.VARIABLE] = str(cache / ptxas.CARRIED)
    packages = cache / FOLDER / PACKAGES
    if packages.is_dir():
        paths = [os.environ.get("PYTHONPATH", ""), str(packages)]
        told["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return told


def cache_folder(told: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder of Triton's cache."""
    return Path(told.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def count(wanted: Sequence[Wanted]) -> str:
    """Launches what `pack` covers under a stand-in driver; says how much Triton had to compile."""
    made = _run("count", wanted, {})
    return (
        f"{made['launches']} launches of {made['kernels']} kernels and {made['launchers']} "
        f"launchers: {made['compiled']} kernels and {made['launchers_missing']} launchers were "
        f"not in {cache_folder()}"
    )


def _install(stage: Path, to: Path) -> None:
    """Raises OSError or ValueError, as what is unpacked cannot be put into its places."""
    own = to / FOLDER
    own.mkdir(exist_ok=True)
    for wheel in sorted((stage / archives.WHEELS).glob("*.whl")):
        with zipfile.ZipFile(wheel) as held:  # leaves out what would lead out of the folder
            held.extractall(own / PACKAGES)
    for name in (archives.PTXAS, archives.MANIFEST):
        if (stage / name).exists():
            (stage / name).replace(own / name)
    if (stage / archives.CACHE).is_dir():
        archives.move_into_cache(stage / archives.CACHE, to)


def _fit(manifest: Manifest, to: Path) -> str:
    assembler = os.environ.get(ptxas.VARIABLE) or str(to / ptxas.CARRIED)
    here = facts_here(_arch_here(manifest.facts.arch), _says(assembler))
    found = differences(manifest, here, machine.commit())
    if found:
        return (
            f"The carried kernels do not all fit ({'; '.join(found)}): others are compiled here, "
            "which costs only time"
        )
    return f"The carried kernels fit this machine: {_held(manifest)}"


def _held(manifest: Manifest) -> str:
    launchers = f" and {manifest.launchers} launchers" if manifest.launchers else ""
    return f"{manifest.kernels} kernels{launchers} for {', '.join(manifest.covers)}"


def _arch_here(otherwise: int) -> int:
    import torch

    if not torch.cuda.is_available():
        return otherwise
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _says(assembler: str) -> str:
    """All that a ptxas says of its version, which is what Triton's keys have of it."""
    try:
        return subprocess.run(
            [assembler, "--version"], capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return "that does not run"


def _sound_ptxas() -> ptxas.Ptxas:
    try:
        found = ptxas.best(ptxas.find())
    except ValueError as error:
        raise UsageError(str(error)) from None
    least = ".".join(map(str, ptxas.SOUND))
    if found is None or not found.sound:
        instead = "none is here" if found is None else f"here is {found.told()}"
        raise UsageError(
            f"kernels for Hopper want ptxas {least} or newer, {instead}: set {ptxas.VARIABLE}, or "
            "install nvidia-cuda-nvcc"
        )
    if Path(found.path).read_bytes()[: len(_ELF)] != _ELF:
        raise UsageError(
            f"{found.path} is a script that starts ptxas elsewhere, which would not be there: set "
            f"{ptxas.VARIABLE} to the program itself"
        )
    return found


def _require_writable(out: Path) -> None:
    """Before minutes are spent."""
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise UsageError(f"{out} cannot be written: its folder must be there and writable")


def _run(what: str, wanted: Sequence[Wanted], told: Mapping[str, str]) -> dict[str, Any]:
    """carried_kernels.py in a process of its own."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    known["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *KERNELS, what, *map(str, wanted)],
        env={**known, **told}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UsageError(f"compiling ahead ended with code {done.returncode}; the reason is above")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for line in made["failed"]:
        print(f"does not compile: {line}", file=sys.stderr)
    return made


def _mb(size: int) -> str:
    return f"{size / 2**20:.1f} MB"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="python -m resfuse.tools.gpu_plan.carried", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="compile for an H200 that is not here, and pack")
    packing.add_argument("out", metavar="OUT", type=Path)
    packing.add_argument("wanted", metavar="MODEL:BATCH:DTYPE", nargs="+")
    packing.add_argument(
        "--wheel", metavar="FILE", type=Path, action="append", default=[],
        help="a package that travels along, cudnn-frontend's say",
    )  # fmt: skip
    unpacking = commands.add_parser("unpack", help="put an archive into Triton's cache")
    unpacking.add_argument("archive", metavar="ARCHIVE", type=Path)
    unpacking.add_argument("to", metavar="DIR", type=Path, nargs="?", default=cache_folder())
    counting = commands.add_parser("count", help="what Triton's cache lacks for networks")
    counting.add_argument("wanted", metavar="MODEL:BATCH:DTYPE", nargs="+")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for bad input, of which one sentence is said."""
    try:
        args = parser().parse_args(arguments)
        if args.command == "unpack":
            print(unpack(args.archive, args.to))
            return 0
        wanted = [Wanted.parse(text) for text in args.wanted]
        told = count(wanted) if args.command == "count" else pack(args.out, wanted, args.wheel)
        print(told)
    except UsageError as error:
        print(f"carried: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
