"""Puts an archive where its parts belong: rows into results/, times and compiled kernels into the
caches. What is there already stays; nothing is doubled."""

import tempfile
from pathlib import Path

from resfuse.bench.common.errors import UsageError
from resfuse.bench.layers.kernel_check.check_command import SHEET as CONFIGS
from resfuse.bench.records import results
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.results import ENVIRONMENTS
from resfuse.bench.records.sheet import Sheet
from resfuse.kernels.tuning_cache.regular_file import read_regular
from resfuse.kernels.tuning_cache.timing_cache import MOST_BYTES as MOST_CACHE_BYTES
from resfuse.kernels.tuning_cache.timing_cache import lines_from
from resfuse.tools.gpu_plan import archive as archives
from resfuse.tools.gpu_plan.archive import INDUCTOR, RESULTS, SUFFIXES, TIMINGS, Places

SHEETS: tuple[Sheet, ...] = (CASES, CONFIGS)
THEIRS = ("NOTES.md",)  # people write in it: an archive's is taken where there is none


def restore(archive: Path, where: Places) -> tuple[list[Path], list[str]]:
    """Merges an archive.

    Args:
        archive: as archive.pack wrote it.
        where: results and caches to merge it into.

    Returns:
        the results folders it had something for; sentences on what was done.

    Raises:
        UsageError: the archive or a folder cannot be read or written.
    """
    found = archives.unpack(archive)
    try:
        return _restored(found, where)
    except UsageError as error:
        raise UsageError(f"archive {archive}: {error}") from None
    except OSError as error:  # a name that no file can have, a full disk
        said = f"{error.strerror or error}: {str(error.filename)[-80:]}"
        raise UsageError(f"archive {archive} cannot be put into its places: {said}") from None


def _restored(found: dict[str, bytes], where: Places) -> tuple[list[Path], list[str]]:
    names = sorted({Path(name).parts[1] for name in found if name.startswith(f"{RESULTS}/")})
    said = []
    for name in names:
        prefix = f"{RESULTS}/{name}/"
        files = {n.removeprefix(prefix): c for n, c in found.items() if n.startswith(prefix)}
        said.append(_merge_folder(where.results / name, files))
    times = {Path(n).name: c for n, c in found.items()
             if n.startswith(f"{TIMINGS}/") and n.endswith(".jsonl")}  # fmt: skip
    if times:
        new = sum(_merge_lines(where.timings / name, told) for name, told in times.items())
        said.append(f"{new} new times of the engine's in {where.timings}")
    kernels = {
        n.removeprefix(f"{INDUCTOR}/"): c for n, c in found.items() if n.startswith(f"{INDUCTOR}/")
    }
    if kernels and where.inductor is not None:
        for name, content in kernels.items():
            if not (where.inductor / name).exists():
                _put(where.inductor / name, content)
        said.append(f"{len(kernels)} files of torch.compile's cache in {where.inductor}")
    return [where.results / name for name in names], said


def _merge_folder(folder: Path, files: dict[str, bytes]) -> str:
    with tempfile.TemporaryDirectory() as name:
        there = Path(name)
        for file, content in files.items():
            (there / Path(file).name).write_bytes(content)
        if (there / ENVIRONMENTS).exists():
            for env_id, facts in results.read_environments(there).items():
                results.record_environment(folder, env_id, facts)
        counts = [f"{_merge_rows(folder, there, sheet)} new rows in {folder / sheet.file}"
                  for sheet in SHEETS if results.has_rows(there, sheet)]  # fmt: skip
    sheets = {sheet.file for sheet in SHEETS} | {ENVIRONMENTS}
    for file, content in files.items():
        if file in sheets or Path(file).suffix not in SUFFIXES:
            continue
        if not (file in THEIRS and (folder / file).exists()):
            _put(folder / Path(file).name, content)
    return ", ".join(counts) or f"no rows for {folder}"


def _merge_rows(folder: Path, there: Path, sheet: Sheet) -> int:
    known = set[tuple[str, ...]]()
    if results.has_rows(folder, sheet):
        known = set(_rows(folder, sheet))
    new = [row for row in dict.fromkeys(_rows(there, sheet)) if row not in known]
    for row in new:
        results.append_row(folder, dict(zip(sheet.columns, row, strict=True)), sheet)
    return len(new)


def _rows(folder: Path, sheet: Sheet) -> list[tuple[str, ...]]:
    table = results.read_cells(folder, sheet, only_whole=True)
    table = table.reindex(columns=list(sheet.columns), fill_value="")
    return list(table.itertuples(index=False, name=None))


def _merge_lines(file: Path, told: bytes) -> int:
    """Appends the lines of a timing cache that the one here has not, in their order: of two times
    for a choice the last counts. What a TimingCache would not use is left out."""
    lines = lines_from(file.name, told)
    here = read_regular(file, MOST_CACHE_BYTES) if file.exists() else b""
    known = set(here.split(b"\n"))
    new = [line for line in lines if line not in known]
    if new:
        start = b"\n" if here and not here.endswith(b"\n") else b""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as out:
            out.write(start + b"\n".join(new) + b"\n")
    return len(new)


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
