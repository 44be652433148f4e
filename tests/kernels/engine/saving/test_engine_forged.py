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


def conv_in(told: Any) -> Any:
    return next(n for n in graph_in(told)["nodes"] if n["operation"] == "Conv")


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
        lambda t: conv_in(t)["problem"].update(padding=[True, 1]), r"has padding \(True, 1\)",
    ),
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
