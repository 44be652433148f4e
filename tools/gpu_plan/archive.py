"""One file that brings a plan home: rows and notes, the engine's times, inductor's cache.

    results/<folder>/*      rows, environments, answers, notes, engines' plans, state of the plan
    timings/*.jsonl         the engine's timing cache: its key holds wherever the environment does
    inductor/**             torch.compile's, as far as there is room: largest first out

Written beside the old one and put in its place, so that whatever ends the plan leaves a whole one.
Inductor's cache, which takes seconds to pack, is in the last one only.
"""

import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from resfuse.bench.common.errors import UsageError
from resfuse.kernels.tuning_cache.regular_file import read_regular
from resfuse.tools.gpu_plan.plan_steps import LIMIT_MB

LIMIT_BYTES = LIMIT_MB << 20
MOST_PACKED_BYTES = 4 * LIMIT_BYTES  # what is read back: the limit may have been raised
MOST_BYTES = 512 << 20
SUFFIXES = (".csv", ".json", ".md", ".txt")  # of a results folder; plots are drawn from the rows
PRESET = 1  # of xz: level 6 takes six times as long for a sixth less, and a GPU waits
RESULTS, TIMINGS, INDUCTOR = "results", "timings", "inductor"


@dataclass(frozen=True)
class Places:
    """The folders an archive is made from and unpacked to; `inductor` is None where unknown."""

    results: Path
    timings: Path
    inductor: Path | None


def places(root: Path, environment: Mapping[str, str] = os.environ) -> Places:
    """The user's own caches, or those that the environment names."""
    from resfuse.kernels.cpu.library import cache_folder

    inductor = environment.get("TORCHINDUCTOR_CACHE_DIR")
    return Places(root, cache_folder() / "timings", Path(inductor) if inductor else None)


def pack(
    archive: Path,
    folder: Path,
    where: Places,
    limit_bytes: int = LIMIT_BYTES,
    with_inductor: bool = True,
) -> str:
    """Writes a tar.xz of a results folder and the caches, of no more than `limit_bytes`.

    Args:
        archive: its path.
        folder: of the environment, in `where.results`.
        with_inductor: whether its cache is looked at.

    Returns:
        a sentence on what was left out for want of room, or "".

    Raises:
        UsageError: it cannot be written.
    """
    room, taken, left_out = limit_bytes - 4096, list[tuple[str, bytes]](), list[int]()
    for name, path in _wanted(folder, where, with_inductor):
        try:
            size = path.stat().st_size
            # Nothing compresses tenfold: what is too large for that is not even read.
            content = path.read_bytes() if size <= 10 * room else None
        except OSError:  # a cache's: gone since it was listed
            continue
        if content is not None and (packed := _packed_bytes(content)) <= room:
            room -= packed
            taken.append((name, content))
        else:
            left_out.append(size)
    data = _tar(taken)
    while len(data) > limit_bytes and taken:  # the estimate is an upper bound; but a limit is one
        taken.pop()
        data = _tar(taken)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        temporary = archive.with_name(archive.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(archive)
    except OSError as error:
        raise UsageError(
            f"archive {archive} cannot be written: {error.strerror or error}"
        ) from None
    if not left_out:
        return ""
    megabytes = sum(left_out) / 2**20
    return f"{len(left_out)} files of {megabytes:.0f} MB found no room in {archive.name}"


def unpack(archive: Path) -> dict[str, bytes]:
    """Name -> content of every file in an archive.

    Raises:
        UsageError: it cannot be read, unpacks to more than MOST_BYTES, or a name in it leads
            elsewhere.
    """
    try:
        data = _unpacked(read_regular(archive, MOST_PACKED_BYTES))
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            found = {member.name: _content(tar, member) for member in tar if member.isfile()}
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error) or "it is cut off"
        raise UsageError(f"archive {archive} cannot be read: {said}") from None
    for name in found:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise UsageError(f"archive {archive} holds {name[:80]!r}, which leads elsewhere")
    return found


def _unpacked(data: bytes) -> bytes:
    """Raises ValueError where there is more than MOST_BYTES, and LZMAError where it is damaged."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_BYTES)
    unpacked = reader.decompress(data, MOST_BYTES + 1)
    if len(unpacked) > MOST_BYTES:
        raise ValueError(f"it unpacks to more than {MOST_BYTES >> 20} MB")
    if not reader.eof:
        raise EOFError
    return unpacked


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MOST_BYTES:  # a sparse file says what it likes
        raise ValueError(f"it holds a file of more than {MOST_BYTES >> 20} MB")
    file = tar.extractfile(member)
    assert file is not None  # a regular file has a content
    return file.read()


def _wanted(folder: Path, where: Places, with_inductor: bool) -> Iterator[tuple[str, Path]]:
    """Names and paths, what cannot be measured again first, then the smaller ones."""
    kept = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]
    for path in sorted(kept, key=lambda path: (path.suffix != ".csv", path.name)):
        yield f"{RESULTS}/{folder.name}/{path.name}", path
    for path in sorted(where.timings.glob("*.jsonl")):
        yield f"{TIMINGS}/{path.name}", path
    if with_inductor and where.inductor is not None:
        files = [path for path in where.inductor.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (_bytes(path), path)):
            yield f"{INDUCTOR}/{path.relative_to(where.inductor).as_posix()}", path


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since
        return 0


def _packed_bytes(content: bytes) -> int:
    """No less than xz makes of it: zlib's is quick and larger; a header, by rule of thumb."""
    return min(len(content) + len(content) // 1000, len(zlib.compress(content, 1))) + 256


def _tar(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=PRESET)
