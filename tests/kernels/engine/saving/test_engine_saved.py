"""Engines on disk, and engines that are given new weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine_models import SHAPE, images, made, require_answers, small
from resfuse.kernels import Engine, build_engine
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.saving.engine_file import _digest

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(small)


@pytest.fixture
def engine(model: nn.Module, timings: Path) -> Engine:
    return build_engine(model, images(*SHAPE), timings=timings)


# Save and load


@pytest.fixture(scope="module")
def content(model: nn.Module, timings: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of a file with a saved engine."""
    path = tmp_path_factory.mktemp("saved") / "small.engine"
    build_engine(model, images(*SHAPE), timings=timings).save(path)
    return path.read_bytes()


@pytest.fixture
def saved(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "small.engine"
    path.write_bytes(content)
    return path


def test_a_loaded_engine_gives_the_same_bits(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "small.engine")
    loaded = load_engine(tmp_path / "small.engine")
    for seed in (1, 2):
        x = images(*SHAPE, seed=seed)
        assert torch.equal(loaded(x), engine(x))
    assert loaded.batch_sizes == engine.batch_sizes
    assert loaded._built[SHAPE].segments == engine._built[SHAPE].segments
    with pytest.raises(ValueError, match="a batch of 3"):
        loaded(images(3, *SHAPE[1:]))


def test_a_loaded_engine_can_be_saved_and_refreshed(saved: Path, tmp_path: Path) -> None:
    loaded, other = load_engine(saved), made(small)
    with torch.no_grad():
        other.get_parameter("stem.weight").mul_(1.5)
    loaded.refresh(other.state_dict())
    require_answers(loaded, other, images(*SHAPE))
    loaded.save(tmp_path / "again.engine")
    x = images(*SHAPE)
    assert torch.equal(load_engine(tmp_path / "again.engine")(x), loaded(x))


def test_nothing_is_unpickled(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        told = json.loads(file.metadata()["resfuse"])
    assert told["schema"] == 7 and list(told["plans"]) == ["2x3x33x29"]


def told_in(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["resfuse"]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another plan with the same weights."""
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["resfuse"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(told)
    text = json.dumps(told)
    save_file(tensors, path, metadata={"resfuse": text, "sha256": _digest(text, tensors)})


def drop_a_weight(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["stem.weight"]
    digest = _digest(metadata["resfuse"], tensors)
    save_file(tensors, path, metadata={**metadata, "sha256": digest})


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "no engine, or a damaged one"),
    "cut in the header": (lambda p: cut(p, 0.01), "no engine, or a damaged one"),
    "cut in the weights": (lambda p: cut(p, 0.9), "no engine, or a damaged one"),
    "something else": (lambda p: p.write_bytes(b"\x80\x04K\x01." * 99), "no engine"),
    "weights only": (lambda p: save_file({"w": torch.ones(1)}, p), "no engine"),
    "another schema": (lambda p: rewrite(p, lambda t: t.update(schema=99)), "has schema 99"),
    "of version 1, without a digest": (
        lambda p: rewrite(p, lambda t: t.update(schema=1)), "schema 1; .*Build it again",
    ),
    "no digest": (
        lambda p: save_file({"w": torch.ones(1)}, p, metadata={"resfuse": told_in(p)}),
        "is damaged: its digest",
    ),
    "no schema": (lambda p: rewrite(p, lambda t: t.pop("schema")), "has schema None"),
    "another torch": (
        lambda p: rewrite(p, lambda t: t["environment"].update(torch="1.0")), "with torch 1.0",
    ),
    "another processor": (
        lambda p: rewrite(p, lambda t: t["environment"].update(device="a 6502")), "device a 6502",
    ),
    "a weight is missing": (drop_a_weight, "no plan that can be run"),
    "no plans": (lambda p: rewrite(p, lambda t: t.pop("plans")), "no plan that can be run"),
    "empty plans": (lambda p: rewrite(p, lambda t: t["plans"].clear()), "no plan that can be run"),
    "no environment": (
        lambda p: rewrite(p, lambda t: t.pop("environment")), "no plan that can be run",
    ),
    "an unknown tactic": (
        lambda p: rewrite(
            p, lambda t: t["plans"]["2x3x33x29"]["segments"][0]["choice"].update(tactic="magic")
        ),
        "no plan that can be run",
    ),
    "not an object": (
        lambda p: save_file({"w": torch.ones(1)}, p, metadata={"resfuse": "[1, 2]"}), "no engine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_load_refuses_in_a_sentence(saved: Path, what: str) -> None:
    damage, said = DAMAGE[what]
    damage(saved)
    with pytest.raises(ValueError, match=f"argument path: .*{said}"):
        load_engine(saved)


def test_load_refuses_an_engine_of_a_gpu_where_there_is_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(saved, lambda told: told.update(device_type="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="was built on a GPU; there is none here"):
        load_engine(saved)


def test_load_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"argument path: .*missing\.engine does not exist"):
        load_engine(tmp_path / "missing.engine")


FULL_DISK = """
import resource, sys
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.saving.engine_file import _digest
engine = load_engine(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    engine.save(sys.argv[1])
except OSError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_the_old_engine(saved: Path) -> None:
    """No file may grow past 4 KB there, which a write meets as it meets a full disk."""
    before = saved.read_bytes()
    assert len(before) > 4096
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(saved)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "cannot be written" in done.stdout
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_is_not_there_is_an_os_error(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        engine.save(tmp_path / "missing" / "small.engine")


# Refresh


def test_refresh_brings_new_answers(engine: Engine, model: nn.Module) -> None:
    x = images(*SHAPE)
    before = engine(x)
    other = made(small)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    other.get_buffer("norm.running_mean").add_(0.5)
    engine.refresh(other.state_dict())
    require_answers(engine, other, x)
    engine.refresh(model.state_dict())
    assert torch.equal(engine(x), before)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: state.pop("conv.weight"), "conv.weight is missing"),
        (lambda state: state.update({"conv.weight": torch.ones(1)}), "conv.weight has shape"),
        (lambda state: state["conv.weight"].fill_(float("nan")), "conv.weight holds"),
        (lambda state: state["norm.running_var"].fill_(float("inf")), "norm.running_var holds"),
    ],
)
def test_refresh_refuses_and_changes_nothing(
    engine: Engine, model: nn.Module, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    x = images(*SHAPE)
    before = engine(x)
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=f"argument state_dict: {said}"):
        engine.refresh(state)
    assert torch.equal(engine(x), before)


def test_an_engine_without_its_weights(timings: Path, model: nn.Module, tmp_path: Path) -> None:
    engine = build_engine(model, images(*SHAPE), timings=timings, keep_weights=False)
    require_answers(engine, model, images(*SHAPE))
    with pytest.raises(ValueError, match="keep_weights=False"):
        engine.save(tmp_path / "small.engine")
    with pytest.raises(ValueError, match="keep_weights=False"):
        engine.refresh(model.state_dict())
    assert not list(tmp_path.iterdir())
