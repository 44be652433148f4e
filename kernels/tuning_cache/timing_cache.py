"""TimingCache: what was measured on this machine, kept for the next build.

A file for each environment, a line of JSON for each time, appended: a process that dies leaves a
torn last line, two that write at once interleave whole lines, and whatever cannot be read, or was
measured elsewhere, is left out with a warning. A file may have been changed, or be a stranger's: it
can make an engine slower, but is no proof that a choice is right (see Tuner.confirm).
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from resfuse.kernels.cpu.library import cache_folder
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, is_configuration
from resfuse.kernels.tuning_cache.environment import environment
from resfuse.kernels.tuning_cache.regular_file import TooLargeError, open_regular, read_regular

SCHEMA = 1
# 200 networks built in one environment make a file of 2 MB, whose longest line has 2 KB.
MOST_BYTES = 32 << 20
_MOST_LINE_BYTES = 1 << 20
_SENSIBLE_MS = 1e-6, 1e6
# A time with a larger spread was taken while the machine did other work: it serves the build that
# took it, and is taken again by later ones, until it has been taken so often.
NOISY_SPREAD = 0.25
MOST_TRIES = 3
Key = tuple[str, str]


class TimingCache:
    """Milliseconds by (part of a graph, choice), None for what may not be used; and, by keys of
    denylist.py, configurations that may not be used for any part.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """
        Args:
            folder: where the file is; by default in the user's cache.
        """
        self._environment = environment(device)
        self.path = (folder or cache_folder() / "timings") / _file_of(self._environment)
        self._torn = False  # the file ends within a line
        self._noisy: dict[Key, int] = {}  # how often those have been taken whose spread is large
        self._times = self._read()
        self._own: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._times

    def get(self, key: Key) -> float | None:
        """The time of a part and choice that is in the cache."""
        return self._times[key]

    def is_own(self, key: Key) -> bool:
        """Whether a time, or that there is none, was found through this object, and not read."""
        return key in self._own

    def is_to_be_taken_again(self, key: Key) -> bool:
        """Whether a time was read that was taken while the machine did other work."""
        return key not in self._own and 0 < self._noisy.get(key, 0) < MOST_TRIES

    @property
    def barred(self) -> Barred:
        """The configurations that nothing may choose, whatever the part."""
        return frozenset(k for k, ms in self._times.items() if ms is None and is_configuration(k))

    def put(
        self, key: Key, ms: float | None, why: str = "", *, spread: float | None = None
    ) -> None:
        """Keeps a time, here and in the file; an unwritable file is a warning.

        Args:
            why: there is none, for those who read the file.
            spread: how much longer a run took than the shortest one, as a share of it.
        """
        self.put_here(key, ms)
        row: dict[str, Any] = {"part": key[0], "choice": key[1], "ms": ms}
        if why:
            row["why"] = why
        if spread is not None:
            row["spread"] = round(spread, 3)
        self._append(row)

    def put_here(self, key: Key, ms: float | None) -> None:
        """Keeps a time for as long as this object lives."""
        self._times[key] = ms
        self._own.add(key)

    def forget(self, key: Key) -> None:
        """As if it had never been put."""
        self._own.discard(key)
        if self._times.pop(key, "never") != "never":
            self._append({"part": key[0], "choice": key[1], "forgotten": True})

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(handle, "ab", buffering=0) as file:
                begun = os.fstat(handle).st_size > 0
                data = (("\n" * self._torn if begun else self._header()) + line).encode()
                # One write: lines of two processes stay whole.
                self._torn = file.write(data) != len(data)
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            warnings.warn(f"times are not kept in {self.path}: {error}", stacklevel=3)

    def _header(self) -> str:
        return json.dumps({"schema": SCHEMA, "environment": self._environment}) + "\n"

    def _read(self) -> dict[Key, float | None]:
        try:
            data = read_regular(self.path, MOST_BYTES)
        except FileNotFoundError:
            return {}
        except TooLargeError as error:
            warnings.warn(f"times kept in {self.path} are not used: {error.strerror}", stacklevel=3)
            _set_aside(self.path)
            return {}
        except OSError as error:
            warnings.warn(f"times kept in {self.path} cannot be read: {error}", stacklevel=3)
            return {}
        self._torn = bool(data) and not data.endswith(b"\n")
        ours = {"schema": SCHEMA, "environment": self._environment}
        known: dict[Key, float | None] = {}
        bad, headed = 0, not data
        for _, row in _rows(data):
            if row is not None and "schema" in row:
                headed = row == ours
                if not headed:
                    break
            elif row is None or not _is_time(row):
                bad += 1
            elif "forgotten" in row:
                known.pop((row["part"], row["choice"]), None)
            else:
                key = row["part"], row["choice"]
                known[key] = row["ms"]
                noisy = row.get("spread", 0) > NOISY_SPREAD
                self._noisy[key] = self._noisy.get(key, 0) + 1 if noisy else 0
        if not headed:
            warnings.warn(
                f"times kept in {self.path} are from another environment and are not used",
                stacklevel=3,
            )
            _set_aside(self.path)
            return {}
        if bad:
            warnings.warn(f"{bad} damaged lines of {self.path} are not used", stacklevel=3)
        return known


@functools.cache
def known(device: torch.device) -> Barred:
    """What is barred on a device, as this process first found it."""
    return TimingCache(device).barred if device.type in ("cuda", "cpu") else NONE


def lines_from(name: str, data: bytes) -> list[bytes]:
    """The lines of a file of times from elsewhere that a TimingCache would use, its header first.

    Args:
        name: the file's, which says whose times it holds.

    Returns:
        none where it holds another environment's, or another version of this package wrote it.
    """
    lines = list[bytes]()
    for line, row in _rows(data[: data.rfind(b"\n") + 1]):
        if row is not None and "schema" in row:
            told = row.get("environment")
            if row["schema"] != SCHEMA or not isinstance(told, dict) or name != _file_of(told):
                return []
            lines.insert(0, line)
        elif row is not None and _is_time(row):
            lines.append(line)
    return lines if lines and b'"schema"' in lines[0] else []


def _file_of(environment: Mapping[str, Any]) -> str:
    told = json.dumps(environment, sort_keys=True)
    return f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.jsonl"


def _rows(data: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines that are not empty, and the object in each; None for one that holds none."""
    start = 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if stop > start:
            short = stop - start <= _MOST_LINE_BYTES
            yield data[start:stop], _parsed(data[start:stop]) if short else None
        start = stop + 1


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs as a dict, and raises ValueError if a name occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a name stands twice")
    return row


def _is_time(row: dict[str, Any]) -> bool:
    least, most = _SENSIBLE_MS
    ms = row.get("ms", "missing")
    sensible = ms is None or (type(ms) in (int, float) and least <= ms <= most)  # True is no time
    spread = row.get("spread", 0)
    sensible = sensible and type(spread) in (int, float) and spread >= 0
    if "forgotten" in row:
        sensible = row["forgotten"] is True and "ms" not in row
    return sensible and isinstance(row.get("part"), str) and isinstance(row.get("choice"), str)


def _set_aside(path: Path) -> None:
    """Out of the way, so that a new file can be begun."""
    with contextlib.suppress(OSError):
        path.replace(path.with_suffix(".foreign"))
