"""The archive of carried kernels: one tar.xz, written the same for the same files, and read as what
it is: a file from elsewhere, perhaps damaged, perhaps something else altogether.

    manifest.json           carried_manifest.py
    cache/KEY/FILE          of Triton's cache: cubins, their metadata, launchers
    ptxas                   the assembler that the keys name
    wheels/NAME.whl         to be unpacked beside them
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from resfuse.kernels.tuning_cache.regular_file import read_regular

MANIFEST, CACHE, PTXAS, WHEELS = "manifest.json", "cache", "ptxas", "wheels"
LIMIT_BYTES = 64 << 20  # what a lent machine takes with it, working tree included
MOST_BYTES = 1 << 30  # unpacked: ResNet-50's kernels and ptxas are 0.1 GB
_NAMES = re.compile(
    r"manifest\.json|ptxas"
    r"|cache/[A-Z2-7]{52}/[A-Za-z0-9_][A-Za-z0-9_.\-]*"  # SHA-256 in base 32
    r"|wheels/[A-Za-z0-9_][A-Za-z0-9_.+\-]*\.whl"
)
_GROUP = "__grp__"  # Triton's list of a kernel's files, by absolute paths


class Foreign(ValueError):
    """Not an archive of carried kernels; the message says what it has instead."""


def write(out: Path, files: Mapping[str, bytes | Path]) -> None:
    """Writes an archive at once, or not at all.

    Args:
        files: what it holds, by name: contents, or where they are.

    Raises:
        OSError: it cannot be written, or one of the files not be read.
    """
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        with tarfile.open(temporary, "w:xz", preset=9) as tar:
            for name in sorted(files, key=lambda name: (name != MANIFEST, name)):
                given = files[name]
                content = given.read_bytes() if isinstance(given, Path) else given
                member = tarfile.TarInfo(name)
                member.size = len(content)
                member.mode = 0o755 if name == PTXAS else 0o644
                tar.addfile(member, io.BytesIO(content))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def extract(archive: Path, to: Path) -> None:
    """Unpacks into an empty folder; only plain files of the names above, which lie within it.

    Raises:
        Foreign: something else is in it, or too much.
        OSError, EOFError, lzma.LZMAError, tarfile.TarError: it cannot be read, or is damaged.
    """
    size = 0
    packed = io.BytesIO(read_regular(archive, 2 * LIMIT_BYTES))
    with tarfile.open(fileobj=packed, mode="r:xz") as tar:
        for member in tar:
            if not member.isreg() or _NAMES.fullmatch(member.name) is None:
                raise Foreign(f"it holds {member.name[:80]!r}")
            size += member.size
            if size > MOST_BYTES:
                raise Foreign(f"it unpacks to more than {MOST_BYTES >> 30} GB")
            tar.extract(member, to, filter="data")
    if not (to / MANIFEST).is_file():
        raise Foreign("it has no manifest")


def relative(group: bytes) -> bytes:
    """A group file of Triton's for the archive: its files by name, and only those that travel."""
    names = json.loads(group)["child_paths"]
    kept = {name: name for name in sorted(names) if name.endswith((".cubin", ".json"))}
    return json.dumps({"child_paths": kept}).encode()


def move_into_cache(extracted: Path, cache: Path) -> None:
    """Puts a kernel's files where Triton looks for them; its group, which makes them known, last.

    Raises:
        OSError: they cannot be written there.
        ValueError: a group file is none.
    """
    for folder in sorted(extracted.iterdir()):
        target = cache.resolve() / folder.name
        target.mkdir(exist_ok=True)
        if target.is_symlink():  # arranged by hand, and outside
            continue
        for file in sorted(folder.iterdir(), key=lambda file: file.name.startswith(_GROUP)):
            if file.name.startswith(_GROUP):
                names = json.loads(file.read_bytes())["child_paths"]
                paths = {name: str(target / Path(name).name) for name in names}
                file.write_text(json.dumps({"child_paths": paths}))
            file.replace(target / file.name)


def is_group(name: str) -> bool:
    return name.startswith(_GROUP)
