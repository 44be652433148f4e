"""`resfuse engine`: builds, explains, checks, times, saves and loads; bad input gets a sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from resfuse.bench.cli import main

pytestmark = pytest.mark.slow

SMALL = ["engine", "cifar_resnet20", "--img-size", "16", "--device", "cpu", "--time", "0.05"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An engine for batches of 1 and 2 in a file, with its facts beside it; what was printed."""
    folder = tmp_path_factory.mktemp("engine")
    file, facts = folder / "engine.safetensors", folder / "facts.json"
    timings = ["--timings", str(folder / "timings")]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        made = main([*SMALL, "-b", "2,1", *timings, "--save", str(file), "--json", str(facts)])
    assert made == 0
    return file, "\n".join(printed)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("resfuse: error: ")
    assert said.count("\n") == 1
    return said


def test_tells_what_an_engine_is_like(saved: tuple[Path, str]) -> None:
    file, said = saved
    told = json.loads((file.parent / "facts.json").read_text())
    assert (told["model"], told["precision"]) == ("cifar_resnet20", "float32")
    assert [one["batch_size"] for one in told["batches"]] == [1, 2]
    for one in told["batches"]:
        assert 0 < one["rel_l2_err"] <= one["allowed_err"]
        assert 0 < one["least_mb"] <= one["arena_mb"]
        assert one["speed"]["rounds"] >= 10
        assert f"{one['speed']['p50_ms']:.3f} ms" in said
        assert f"for a batch of {one['batch_size']}" in one["explain"]
    assert "Built in" in said
    assert "a second build took" in said
    assert f"Saved in {file}" in said
    assert list((file.parent / "timings").glob("*.jsonl"))  # what the second build was quick by


def test_loads_what_it_saved(saved: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = saved
    assert main([*SMALL, "--load", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"Loaded from {file}" in said
    assert "Batch 1" in said
    assert "Batch 2" in said
    error = error_of([*SMALL, "--load", str(file), "-b", "3"], capsys)
    assert "--batch-size: 3" in error
    assert "holds 1, 2" in error


def test_an_fp32_network_computed_in_bf16(
    saved: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*SMALL, "-b", "2", "--precision", "bf16"]
    assert main([*asked, "--timings", str(tmp_path), "--json", str(tmp_path / "facts.json")]) == 0
    told = json.loads((tmp_path / "facts.json").read_text())
    assert (told["precision"], told["math_mode"]) == ("bf16", "bf16")
    (one,) = told["batches"]
    assert 1e-4 < one["rel_l2_err"] <= one["allowed_err"]
    assert "to bfloat16" in one["explain"] and one["speed"] is not None
    said = error_of([*asked, "--load", str(saved[0])], capsys)  # an engine that computes in fp32
    assert "it computed in a finer precision than was asked for" in said


def test_another_network_in_the_file_is_wrong(
    saved: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shapes, other weights: the check finds out, and nothing is timed."""
    file, _ = saved
    assert main([*SMALL, "--load", str(file), "-b", "1", "--seed", "1"]) == 1
    said = capsys.readouterr().out
    assert "Wrong, and so not timed: relative error" in said
    assert "Time:" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["engine", "resnet81"], "MODEL: unknown name 'resnet81'; did you mean resnet18"),
        (["engine", "resnet*"], "MODEL: 'resnet*' stands for"),
        (["engine", "resnet18", "-b", "0"], "--batch-size: 0; accepted: whole numbers from 1"),
        (["engine", "resnet18", "-b", "1,x"], "--batch-size: 'x' is not a whole number"),
        (
            ["engine", "resnet18", "--precision", "int8"],
            "--precision: int8 is measured by `resfuse bench`",
        ),
        (["engine", "resnet18", "--img-size", "0"], "--img-size: 0"),
        (["engine", "resnet18", "--device", "gpu"], "--device: 'gpu' cannot be used"),
        (["engine", "resnet18", "--time", "0"], "--time: '0'; accepted: numbers above 0"),
        (["engine", "resnet18", "--save", "/no/such/folder/e"], "--save: /no/such/folder is no"),
        (["engine", "resnet18", "--json", "/"], "--json: / is a folder"),
        (["engine", "resnet18", "--timings", __file__], "is not a folder"),
        (["engine", "resnet18", "--load", "/no/such/engine"], "/no/such/engine does not exist"),
        (["engine", "resnet18", "--precision", "tf32", "--device", "cpu"], "tf32 is a math mode"),
    ],
)
def test_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(arguments, capsys)


def test_refuses_damaged_and_foreign_files(
    saved: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = saved
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:5000])
    assert "damaged" in error_of([*SMALL, "--load", str(cut)], capsys)
    with safe_open(file, framework="pt") as whole:
        header = json.loads(whole.metadata()["resfuse"])
        tensors = {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118
    header["environment"]["device"] = "an abacus"
    foreign = tmp_path / "foreign"
    save_file(tensors, foreign, metadata={"resfuse": json.dumps(header)})
    assert "was built with device an abacus" in error_of([*SMALL, "--load", str(foreign)], capsys)
    if not torch.cuda.is_available():
        header["device_type"] = "cuda"
        save_file(tensors, foreign, metadata={"resfuse": json.dumps(header)})
        assert "built on a GPU" in error_of([*SMALL, "--load", str(foreign)], capsys)


def test_refuses_images_the_file_is_not_for(
    saved: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    larger = [*SMALL[:2], "--img-size", "24", *SMALL[4:], "--load", str(saved[0])]
    assert "this engine takes [N, 3, 16, 16]" in error_of(larger, capsys)
