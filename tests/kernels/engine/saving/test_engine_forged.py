"""A file from a stranger: what the fuzzer (test_engine_fuzz.py) would find rarely."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_fuzz import Saved
from engine_models import images, made
from hostile_engine import SHAPE, mixed
from resfuse.kernels import Engine, build_engine
from resfuse.kernels.engine.load import load_engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(timings: Path) -> Engine:
    return build_engine(made(mixed), images(*SHAPE), timings=timings)


def rewritten(engine: Engine, path: Path, change: Callable[[Any], object]) -> Path:
    engine.save(path)
    saved = Saved(path)
    change(saved.told)
    saved.write(path, renewed=True)
    return path


def graph_in(told: Any) -> Any:
    (plan,) = told["plans"].values()
    return plan["graph"]


def node_in(told: Any, operation: str) -> Any:
    return next(n for n in graph_in(told)["nodes"] if n["operation"] == operation)


def of_groups(**fields: Any) -> Callable[[Any], object]:
    return lambda told: node_in(told, "GroupNorm").update(fields)


def as_integers(told: Any) -> None:
    """Has the group norm read and compute quantised values, between conversions."""
    graph, node = graph_in(told), node_in(told, "GroupNorm")
    (x,), y, at = node["inputs"], node["name"], graph["nodes"].index(node)
    shape = graph["values"][y]["shape"]
    quantised = {"shape": shape, "dtype": "uint8", "scale": 0.1, "zero_point": 3}
    graph["values"] |= {"narrow": quantised, "normalised": quantised}
    node |= {"inputs": ["narrow"], "name": "normalised"}
    narrowed = {"name": "narrow", "inputs": [x], "operation": "Convert", "dtype": "uint8"}
    widened = {"name": y, "inputs": ["normalised"], "operation": "Convert", "dtype": "float32"}
    graph["nodes"][at : at + 1] = [narrowed, node, widened]


FORGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "an operation that reads memory": (
        lambda t: graph_in(t)["nodes"][-1].update(target="aten.as_strided.default"),
        "as_strided.default is not known to only compute",
    ),
    "a result of a type to import": (
        lambda t: graph_in(t).update(
            spec='[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
        ),
        "made up of collections.defaultdict",
    ),
    "a spec without an end": (
        lambda t: graph_in(t).update(spec="[" * 100_000), "made up of nothing",
    ),
    "a padding that is no number": (
        lambda t: node_in(t, "Conv")["problem"].update(padding=[True, 1]),
        r"has padding \(True, 1\)",
    ),
    "groups that do not divide the channels": (of_groups(groups=3), "3 groups of 16 channels"),
    "no groups": (of_groups(groups=0), "0 groups of 16 channels"),
    "a negative number of groups": (of_groups(groups=-4), "-4 groups of 16 channels"),
    "groups that are no number": (of_groups(groups=4.0), r"has groups 4\.0"),
    "an eps below zero": (of_groups(eps=-1.0), r"has eps -1\.0"),
    "an infinite eps": (of_groups(eps=float("inf")), "has eps inf"),
    "another layer's weight": (of_groups(weight="0.weight"), r"0\.weight is torch\.float32"),
    "a weight that is not there": (of_groups(bias="none"), "which the file does not hold"),
    "an activation that is none": (of_groups(activation="exp"), "ends with exp"),
    "a slope without an activation": (of_groups(slope="2.weight"), "has slope '2.weight'"),
    "a residual that is not read": (of_groups(residual=True), "has 1 inputs"),
    "a residual that is not added": (of_groups(residual_last=True), "ends with identity"),
    "a norm of integers": (as_integers, r"normalises torch\.uint8"),
    "a map of terabytes": (
        lambda t: graph_in(t)["values"]["input"].update(shape=[2, 3, 10**6, 10**6]),
        "larger than this machine's memory",
    ),
    "another device's facts left out": (
        lambda t: t["environment"].pop("native"), "was built with native None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_files(name: str, engine: Engine, tmp_path: Path) -> None:
    change, said = FORGED[name]
    with pytest.raises(ValueError, match=f"argument path: .*{said}"):
        load_engine(rewritten(engine, tmp_path / "forged.engine", change))


def test_a_bit_of_the_weights_is_found(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "mixed.engine"
    engine.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its digest"):
        load_engine(path)
