"""Turns quantization.csv and quantization_layers.csv into networks; the latest row of a way counts,
and layers are those of the same ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resfuse.bench.records.outcome import STATUSES
from resfuse.bench.records.quantization_sheet import ASKED, LAYERS, NETWORKS
from resfuse.bench.records.results import read_rows
from resfuse.bench.records.sheet import Sheet
from resfuse.bench.report.data.row_values import Row, finite_numbers

SHARED = ("model", "origin", "data", "calibration_images", "test_images")


@dataclass(frozen=True)
class Layer:
    """A layer quantised by itself."""

    name: str
    depth: int  # from 1
    sqnr_db: float
    clipped_pct: float


@dataclass(frozen=True)
class Quantized:
    """A network in int8, by one tool and method; numbers without the empty ones."""

    tool: str
    method: str
    status: str
    error: str
    commit: str
    numbers: Mapping[str, float]
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class QuantizedNetwork:
    """All ways in which a network was quantised, from the same images."""

    device_name: str
    model: str
    origin: str
    data: str
    calibration_images: int
    test_images: int
    ways: tuple[Quantized, ...]

    @property
    def passed(self) -> list[Quantized]:
        return [way for way in self.ways if way.status == "pass"]


def read_quantization_rows(folder: Path) -> dict[str, tuple[list[Row], list[Row]]]:
    """Returns the complete rows of networks, and of layers, in a folder by env_id; empty without
    files.

    Raises:
        UsageError: a file cannot be read.
    """
    found: dict[str, tuple[list[Row], list[Row]]] = {}
    for at, sheet in enumerate((NETWORKS, LAYERS)):
        for row in _complete(folder, sheet):
            found.setdefault(str(row["env_id"]), ([], []))[at].append(row)
    return {env_id: rows for env_id, rows in found.items() if rows[0]}


def _complete(folder: Path, sheet: Sheet) -> list[Row]:
    path = folder / sheet.file
    if not path.exists() or not path.stat().st_size:
        return []
    rows = read_rows(folder, sheet).to_dict("records")
    return [{str(k): v for k, v in row.items()} for row in rows if row["status"] in STATUSES]


def quantized_networks(rows: Sequence[Row], layers: Sequence[Row]) -> tuple[QuantizedNetwork, ...]:
    """Returns the networks of one environment's rows, in the order they were measured."""
    latest = {_key(row): row for row in rows}
    by_way: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in layers:
        by_way.setdefault((*_key(row), str(row["commit"])), {})[str(row["layer"])] = row
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in latest.values():
        shared = tuple(str(row[name]) for name in ("device_name", *SHARED))
        grouped.setdefault(shared, []).append(row)
    return tuple(_network(group, by_way) for group in grouped.values())


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("device_name", *ASKED))


def _network(
    rows: Sequence[Row], layers: Mapping[tuple[str, ...], Mapping[str, Row]]
) -> QuantizedNetwork:
    first = rows[0]
    ways = []
    for row in rows:
        passed = row["status"] == "pass"
        own = layers.get((*_key(row), str(row["commit"])), {}) if passed else {}
        ways.append(_way(row, list(own.values())))
    return QuantizedNetwork(
        device_name=str(first["device_name"]),
        model=str(first["model"]),
        origin=str(first["origin"]),
        data=str(first["data"]),
        calibration_images=int(float(str(first["calibration_images"]))),
        test_images=int(float(str(first["test_images"]))),
        ways=tuple(ways),
    )


def _way(row: Row, layers: Sequence[Row]) -> Quantized:
    numbers = finite_numbers(row, row if row["status"] == "pass" else ())
    return Quantized(
        tool=str(row["tool"]),
        method=str(row["method"]),
        status=str(row["status"]),
        error=str(row["error"]),
        commit=str(row["commit"]),
        numbers=numbers,
        layers=tuple(sorted(map(_layer, layers), key=lambda layer: layer.depth)),
    )


def _layer(row: Row) -> Layer:
    return Layer(
        name=str(row["layer"]),
        depth=int(float(str(row["depth"]))),
        sqnr_db=float(str(row["sqnr_db"])),
        clipped_pct=float(str(row["clipped_pct"])),
    )
