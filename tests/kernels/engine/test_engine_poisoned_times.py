"""Whatever the file of measured times says, an engine is right: it may only be slower."""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import SHAPE, images, made, require_answers, small
from readback import mutated
from resfuse.kernels import build_engine
from resfuse.kernels.engine.ir.lowered import Call
from resfuse.kernels.engine.tactics.cpu import onednn_conv
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]

CPU = torch.device("cpu")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(small)


@pytest.fixture(scope="module")
def honest(model: nn.Module, timings: Path) -> bytes:
    """The file that a build has left."""
    build_engine(model, images(*SHAPE), timings=timings)
    (file,) = timings.iterdir()
    return file.read_bytes()


def put(folder: Path, content: bytes) -> None:
    path = TimingCache(CPU, folder).path
    path.write_bytes(content)


def forged(honest: bytes, change: Callable[[Row], Row]) -> bytes:
    header, *rows = [json.loads(line) for line in honest.splitlines()]
    lines = [header, *map(change, rows)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


POISON: dict[str, Callable[[Row], Row]] = {
    "everything is barred": lambda row: row | {"ms": None, "why": "so"},
    "torch is barred": lambda row: row | {"ms": None} if "eager" in row["choice"] else row,
    "torch is slow": lambda row: row | {"ms": 1e6 if "eager" in row["choice"] else row["ms"]},
    "everything takes no time": lambda row: row | {"ms": 1e-6},
    "everything takes forever": lambda row: row | {"ms": 1e6},
    "everything is forgotten": lambda row: (
        {k: row[k] for k in ("part", "choice")} | {"forgotten": True}
    ),
}


@pytest.mark.parametrize("what", POISON)
def test_forged_times_change_no_answer(
    what: str, honest: bytes, model: nn.Module, tmp_path: Path
) -> None:
    put(tmp_path, forged(honest, POISON[what]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = build_engine(model, images(*SHAPE), timings=tmp_path)
    require_answers(engine, model, images(*SHAPE, seed=3))


@pytest.mark.parametrize("seed", range(12))
def test_damaged_times_change_no_answer(
    seed: int, honest: bytes, model: nn.Module, tmp_path: Path
) -> None:
    put(tmp_path, mutated(random.Random(seed), honest))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = build_engine(model, images(*SHAPE), timings=tmp_path)
    require_answers(engine, model, images(*SHAPE, seed=3))


def test_a_tactic_is_not_right_because_a_file_has_its_time(
    honest: bytes, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate is right according to the cache, and wrong in this process."""
    fast = forged(honest, lambda row: row | {"ms": 1e-6 if "onednn" in row["choice"] else 1.0})
    put(tmp_path, fast)
    believed = build_engine(model, images(*SHAPE), timings=tmp_path)
    assert any(s.candidate.tactic == "onednn" for s in believed._built[SHAPE].segments)
    lower = onednn_conv.lower

    def wrong(graph: Any, candidate: Any, state: Any, arena: Any) -> Call:
        right = lower(graph, candidate, state, arena)
        name = graph.nodes[candidate.stop - 1].name

        def run(values: dict[str, Tensor]) -> None:
            right.run(values)
            values[name] = values[name] * 1.5

        return Call(run)

    monkeypatch.setattr(onednn_conv, "lower", wrong)
    with pytest.warns(UserWarning, match="onednn.* is barred, its error is"):
        engine = build_engine(model, images(*SHAPE), timings=tmp_path)
    assert all(s.candidate.tactic != "onednn" for s in engine._built[SHAPE].segments)
    require_answers(engine, model, images(*SHAPE, seed=3))
