"""ONNX files as models of the harness: torch runs what was read from them, ONNX Runtime and
OpenVINO run the files themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import torch
from onnx import numpy_helper

from onnx_files import answers_of_onnxruntime, file_of, node, weights
from resfuse.bench.backends import load_build
from resfuse.bench.cli import main
from resfuse.bench.common.errors import CannotTake, UsageError
from resfuse.bench.models.model_builder import batch_size, build, describe, input_shape
from resfuse.bench.models.sources import choose, matching
from resfuse.bench.models.weights_file import state_hash

GIVEN = {
    "w": weights(8, 3, 3, 3), "s": weights(8), "b": weights(8), "m": weights(8),
    "v": np.abs(weights(8)) + np.float32(0.5), "h": weights(8, 5),
}  # fmt: skip
NODES = [
    node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
    node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
    node("Relu", ["n"], ["map"]),
    node("GlobalAveragePool", ["map"], ["p"]),
    node("Flatten", ["p"], ["f"]),
    node("MatMul", ["f", "h"], ["scores"]),
]


def net(path: Path, shape: tuple[int | str, ...] = ("n", 3, 16, 16)) -> str:
    return str(file_of(path, NODES, shape, GIVEN, outputs=("map", "scores")))


@pytest.fixture
def file(tmp_path: Path) -> str:
    return net(tmp_path / "net.onnx")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said by a command that ends with exit code 2."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("resfuse: error: argument --")
    assert said.count("\n") == 1
    return said


def test_a_file_is_a_model(file: str, tmp_path: Path) -> None:
    assert choose("-m", [file]) == [file]
    assert matching(file, ["*"]) == [file]
    assert input_shape(file) == (3, 16, 16)
    assert batch_size(file) is None
    of = describe(file)
    assert (of.name, of.weights) == (file, "own")
    assert of.origin.startswith("net.onnx sha256:")
    one, other = build(file, seed=0), build(file, seed=1)
    assert state_hash(one) == state_hash(other)
    x = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        for found, wanted in zip(
            one(x), answers_of_onnxruntime(Path(file), x.numpy()), strict=True
        ):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxrt", "openvino"])
def test_runtimes_of_onnx_run_the_file_itself(
    backend: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other numbers in the file, written after torch has read it, are in their answers."""
    pytest.importorskip(backend.replace("onnxrt", "onnxruntime"))

    def no_export(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was exported")

    monkeypatch.setattr(torch.onnx, "export", no_export)
    model, x = build(file), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        before = model(x)
    got = load_build(backend)(model, x)(x)
    for found, wanted in zip(got, before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    changed = onnx.load(file)
    head = next(t for t in changed.graph.initializer if t.name == "h")
    head.CopyFrom(numpy_helper.from_array(GIVEN["h"] * 2, "h"))
    onnx.save(changed, file)
    after = load_build(backend)(model, x)(x)
    torch.testing.assert_close(after[1], 2 * before[1], rtol=1e-4, atol=1e-4)


def test_the_file_runs_in_its_own_precision_alone(file: str) -> None:
    model, x = build(file).bfloat16(), torch.randn(2, 3, 16, 16).bfloat16()
    with pytest.raises(CannotTake, match=r"net\.onnx computes in float32, not in bfloat16"):
        load_build("onnxrt")(model, x)


def test_a_batch_that_the_file_fixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = net(tmp_path / "two.onnx", (2, 3, 16, 16))
    assert batch_size(file) == 2
    assert "8; " in (said := refused(capsys, "bench", "-m", file, "-b", "8", "--dry-run"))
    assert "for 2" in said


def test_a_batch_that_the_network_needs(tmp_path: Path) -> None:
    """Open in the file; read for one image, or for as many as are asked for."""
    nodes = [*NODES[:-1], node("Shape", ["f"], ["t"]), node("Cast", ["t"], ["u"], to=1),
             node("ReduceProd", ["u"], ["z"], keepdims=0), node("Mul", ["f", "z"])]  # fmt: skip
    file = str(file_of(tmp_path / "a.onnx", nodes, ("n", 3, 16, 16), GIVEN))
    assert batch_size(file) == 1
    assert batch_size(f"{file}?batch=4") == 4
    x = torch.randn(4, 3, 16, 16)
    (wanted,) = answers_of_onnxruntime(Path(file), x.numpy())
    with torch.inference_mode():
        np.testing.assert_allclose(build(f"{file}?batch=4")(x).numpy(), wanted, rtol=1e-4)


def test_image_sizes_that_the_file_leaves_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = net(tmp_path / "open.onnx", ("n", 3, "h", "w"))
    assert "nothing says what images" in refused(capsys, "bench", "-m", file, "--dry-run")
    of = describe(file, asked=(3, 24, 32))
    assert of.name == f"{file}?height=24&width=32"
    assert input_shape(of.name) == (3, 24, 32)
    assert of.batch_size is None
    with torch.inference_mode():
        assert build(of.name)(torch.randn(2, 3, 24, 32))[0].shape == (2, 8, 12, 16)
    with pytest.raises(UsageError, match=r"takes images of 3x\?x\?, not 4x24x32"):
        describe(file, asked=(4, 24, 32))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "w.pth"], "argument --weights: net.onnx is measured with its own weights"),
        (["--pretrained"], "argument --pretrained: net.onnx is measured with its own weights"),
        (["--img-size", "32"], "net.onnx takes images of 3x16x16, not 3x32x32"),
        (["--input-shape", "1,16,16"], "net.onnx takes images of 3x16x16, not 1x16x16"),
        (["--model-kwargs", "depth=3"], "no argument depth; accepted: batch, channels, height"),
        (["--model-kwargs", "batch=0"], "batch=0; accepted: 1 or more"),
        (["--model-kwargs", "height=32"], "height=32, but the file says 16"),
    ],
)
@pytest.mark.usefixtures("forked_workers")
def test_arguments_that_do_not_fit(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    net(Path("net.onnx"))
    torch.save({}, "w.pth")
    assert said in refused(capsys, "bench", "-m", "net.onnx", "--results", "r", *arguments)


def test_files_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net(Path("net.onnx"))
    Path("half.onnx").write_bytes(Path("net.onnx").read_bytes()[:200])
    Path("vector.onnx").write_bytes(
        file_of(Path("v.onnx"), [node("Relu", ["x"])], ("n", 3)).read_bytes()
    )
    file_of(Path("odd.onnx"), [node("NonZero", ["x"])], ("n", 3, 8, 8))
    for name, said in {
        "no.onnx": "argument --model: there is no file no.onnx",
        "half.onnx": "argument --model: half.onnx",
        "vector.onnx": "vector.onnx takes 2 dimensions; accepted: one batch of images",
        "odd.onnx": "odd.onnx: node 'NonZero_of_y' (NonZero, opset 13) is an operator that is not",
    }.items():
        assert said in refused(capsys, "bench", "-m", name, "--results", "r")


def test_a_file_without_the_package_that_reads_it(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if "onnx_reader.reading.model_file" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match="the package onnx is not installed"):
        input_shape(file)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_a_file_is_measured_by_every_backend(file: str, tmp_path: Path) -> None:
    results = tmp_path / "results"
    backends = ["eager", "onnxrt", "openvino", "fused", "engine"]
    options = ["--seconds", "0.05", "--threads", "1", "--results", str(results)]
    assert main(["bench", "-m", file, "--backend", ",".join(backends), "-b", "2", *options]) == 0
    rows = pd.read_csv(next(results.rglob("rows.csv")))
    assert set(rows["status"]) == {"pass"}, list(rows["error"])
    assert len(rows) == 7  # eager and engine in two memory formats
    assert set(rows["backend"]) == set(backends)
    assert rows["weights_sha256"].nunique() == 1
    assert set(rows["input_shape"]) == {"3x16x16"}
    assert rows["origin"].str.startswith("net.onnx sha256:").all()
    assert (rows["rel_l2_err"] < 1e-5).all()


def test_a_file_of_pixels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`load_onnx` reads it, but the images that backends are compared on are floats."""
    nodes = [node("Cast", ["x"], ["f"], to=1), node("GlobalAveragePool", ["f"], ["scores"])]
    path = tmp_path / "bytes.onnx"
    file_of(path, nodes, ("n", 3, 16, 16), outputs=["scores"], dtype=2, out_dtype=1)
    for command in (["bench", "-m"], ["engine"], ["study", "quantization", "-m"]):
        said = refused(capsys, *command, str(path))
        assert "bytes.onnx takes images in uint8; accepted: files that take floating" in said
