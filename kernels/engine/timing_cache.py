"""TimingCache: what was measured on this machine, kept for the next build.

A file for each environment, a line of JSON for each time, appended: a process that dies leaves a
torn last line, two that write at once interleave whole lines, and whatever cannot be read, or was
measured elsewhere, is left out with a warning.
"""

import contextlib
import hashlib
import json
import warnings
from pathlib import Path

import torch

from resfuse.kernels.engine.environment import environment
from resfuse.kernels.native.library import cache_folder

SCHEMA = 1


class TimingCache:
    """Milliseconds by (part of a graph, choice), None for what gave a wrong answer."""

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

    def put(self, key: tuple[str, str], ms: float | None) -> None:
        """Keeps a time, here and in the file; an unwritable file is a warning."""
        self._times[key] = ms
        line = json.dumps({"part": key[0], "choice": key[1], "ms": ms}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            start = "\n" * self._torn if self.path.exists() else self._header()
            with self.path.open("ab", buffering=0) as file:
                file.write((start + line).encode())  # one write: lines of two processes stay whole
            self._torn = False
        except OSError as error:
            warnings.warn(f"times are not kept in {self.path}: {error}", stacklevel=2)

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
        return {(row["part"], row["choice"]): row["ms"] for row in times}


def _parsed(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_time(row: dict) -> bool:
    ms = row.get("ms", "missing")
    sensible = ms is None or (type(ms) in (int, float) and 0 < ms < 1e6)  # True is no time
    return sensible and isinstance(row.get("part"), str) and isinstance(row.get("choice"), str)


def _set_aside(path: Path) -> None:
    """Out of the way, so that a new file can be begun."""
    with contextlib.suppress(OSError):
        path.replace(path.with_suffix(".foreign"))
