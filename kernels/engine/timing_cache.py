"""TimingCache: what was measured on this machine, kept for the next build.

A file for each environment, a line of JSON for each time, appended: a process that dies leaves a
torn last line, two that write at once interleave whole lines, and whatever cannot be read, or was
measured elsewhere, is left out with a warning.
"""

import contextlib
import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from resfuse.kernels.barred import NONE, Barred, is_configuration
from resfuse.kernels.engine.environment import environment
from resfuse.kernels.native.library import cache_folder

SCHEMA = 1


class TimingCache:
    """Milliseconds by (part of a graph, choice), None for what may not be used; and, by keys of
    barred.py, configurations that may not be used for any part.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """
        Args:
            folder: where the file is; by default in the user's cache.
        """
        self._environment = environment(device)
        told = json.dumps(self._environment, sort_keys=True)
        name = hashlib.sha256(told.encode()).hexdigest()[:16]
        self.path = (folder or cache_folder() / "timings") / f"{name}.jsonl"
        self._torn = False  # the file ends within a line
        self._times = self._read()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._times

    def get(self, key: tuple[str, str]) -> float | None:
        """The time of a part and choice that is in the cache."""
        return self._times[key]

    @property
    def barred(self) -> Barred:
        """The configurations that nothing may choose, whatever the part."""
        return frozenset(k for k, ms in self._times.items() if ms is None and is_configuration(k))

    def put(self, key: tuple[str, str], ms: float | None, why: str = "") -> None:
        """Keeps a time, here and in the file; an unwritable file is a warning.

        Args:
            why: there is none, for those who read the file.
        """
        self._times[key] = ms
        self._append({"part": key[0], "choice": key[1], "ms": ms} | ({"why": why} if why else {}))

    def put_here(self, key: tuple[str, str], ms: float | None) -> None:
        """Keeps a time for as long as this object lives."""
        self._times[key] = ms

    def forget(self, key: tuple[str, str]) -> None:
        """As if it had never been put."""
        if self._times.pop(key, "never") != "never":
            self._append({"part": key[0], "choice": key[1], "forgotten": True})

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            start = "\n" * self._torn if self.path.exists() else self._header()
            with self.path.open("ab", buffering=0) as file:
                file.write((start + line).encode())  # one write: lines of two processes stay whole
            self._torn = False
        except OSError as error:
            warnings.warn(f"times are not kept in {self.path}: {error}", stacklevel=3)

    def _header(self) -> str:
        return json.dumps({"schema": SCHEMA, "environment": self._environment}) + "\n"

    def _read(self) -> dict[tuple[str, str], float | None]:
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return {}
        except OSError as error:
            warnings.warn(f"times kept in {self.path} cannot be read: {error}", stacklevel=3)
            return {}
        self._torn = bool(text) and not text.endswith("\n")
        lines = [line for line in text.split("\n") if line]
        rows = [row for line in lines if (row := _parsed(line)) is not None]
        headers = [row for row in rows if "schema" in row]
        ours = {"schema": SCHEMA, "environment": self._environment}
        if not headers or any(header != ours for header in headers):
            warnings.warn(
                f"times kept in {self.path} are from another environment and are not used",
                stacklevel=3,
            )
            _set_aside(self.path)
            return {}
        times = [row for row in rows if _is_time(row)]
        if bad := len(lines) - len(times) - len(headers):
            warnings.warn(f"{bad} damaged lines of {self.path} are not used", stacklevel=3)
        known: dict[tuple[str, str], float | None] = {}
        for row in times:
            key = row["part"], row["choice"]
            if "forgotten" in row:
                known.pop(key, None)
            else:
                known[key] = row["ms"]
        return known


@functools.cache
def known(device: torch.device) -> Barred:
    """What is barred on a device, as this process first found it."""
    return TimingCache(device).barred if device.type in ("cuda", "cpu") else NONE


def _parsed(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_time(row: dict) -> bool:
    ms = row.get("ms", "missing")
    sensible = ms is None or (type(ms) in (int, float) and 0 < ms < 1e6)  # True is no time
    sensible = sensible or row.get("forgotten") is True
    return sensible and isinstance(row.get("part"), str) and isinstance(row.get("choice"), str)


def _set_aside(path: Path) -> None:
    """Out of the way, so that a new file can be begun."""
    with contextlib.suppress(OSError):
        path.replace(path.with_suffix(".foreign"))
