"""Programs of torch.export: read, checked, and refused in a sentence where they cannot be."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.model_builder import batch_size, build, describe, input_shape
from resfuse.bench.models.sources import choose


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layers(x)
        return {"map": y, "mean": y.mean((2, 3))}


def export(file: Path, free: bool, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if free else None
    torch.export.save(torch.export.export(net, (images,), dynamic_shapes=shapes), file)
    return net


def test_a_program_runs_as_the_module_it_was(tmp_path: Path) -> None:
    file, x = tmp_path / "net.pt2", torch.randn(2, 2, 12, 10)
    net = export(file, True, x)
    (name,) = choose("-m", [str(file)])
    model = build(name)
    assert input_shape(name) == (2, 12, 10)
    assert batch_size(name) is None
    assert describe(name).origin.startswith("net.pt2 sha256:")
    with torch.inference_mode():
        for images in (x, torch.randn(5, 2, 12, 10)):
            for key, wanted in net(images).items():
                assert torch.equal(model(images)[key], wanted)
        got = model.double()(x.double())["mean"]  # as the fp64 reference runs it
        torch.testing.assert_close(got.float(), net(x)["mean"])


def test_a_quantised_program_is_refused(tmp_path: Path) -> None:
    from hand_quantized import U8, joined

    file, x = tmp_path / "net.pt2", torch.randn(2, 3, 12, 12)
    net = joined(U8, True).eval()
    net(x)  # which finds scales
    torch.export.save(torch.export.export(net, (x,)), file)
    assert input_shape(str(file)) == (3, 12, 12)
    with pytest.raises(UsageError, match="PT2E has quantised, of which torch computes nothing"):
        build(str(file))


def test_a_batch_that_was_fixed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.pt2"
    export(file, False, torch.randn(3, 2, 12, 12))
    assert batch_size(str(file)) == 3
    assert main(["bench", "-m", str(file), "-b", "8", "--results", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert f"argument --batch-size: 8; {file} was exported for 3" in said


def test_weights_replace_the_programs_own(tmp_path: Path) -> None:
    file, x = tmp_path / "net.pt2", torch.randn(2, 2, 12, 12)
    export(file, True, x)
    other = Net().eval()
    torch.save(other.state_dict(), tmp_path / "w.pth")
    with torch.inference_mode():
        got = build(str(file), weights=str(tmp_path / "w.pth"))(x)["map"]
        assert torch.equal(got, other(x)["map"])


def rewritten(file: Path, change: Callable[[str, bytes], bytes]) -> None:
    """The archive again, with other contents."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(name, data))


def of_the_future(name: str, data: bytes) -> bytes:
    if not name.endswith("models/model.json"):
        return data
    program = json.loads(data)
    program["schema_version"]["major"] += 1
    program["torch_version"] = "9.1.0"
    return json.dumps(program).encode()


class Exploding:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return eval, ("open('exploded', 'w')",)


def pickled_weights(name: str, data: bytes) -> bytes:
    """Weights as torch stores those of other layouts, with an object among them."""
    if name.endswith("data/weights/weight_0"):
        held = io.BytesIO()
        torch.save({"weight": Exploding()}, held)
        return held.getvalue()
    if name.endswith("_weights_config.json"):
        config = json.loads(data)
        for entry in config["config"].values():
            entry["use_pickle"] = entry["path_name"] == "weight_0"
        return json.dumps(config).encode()
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_the_future, f", written by torch 9.1.0, cannot be read by torch {torch.__version__}"),
        (lambda name, data: data[: len(data) // 2], "cannot be read by torch"),
        (pickled_weights, "cannot be read by torch"),
    ],
    ids=["another version", "truncated", "a pickle"],
)
def test_what_cannot_be_read(
    change: Callable[[str, bytes], bytes],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    export(Path("net.pt2"), True, torch.randn(2, 2, 12, 12))
    rewritten(Path("net.pt2"), change)
    capfd.readouterr()
    assert main(["bench", "-m", "net.pt2", "--results", "r"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("resfuse: error: argument --model: net.pt2")
    assert said in error
    assert error.count("\n") == 1
    assert not Path("exploded").exists()


def test_what_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UsageError, match=r"a\.pt2 cannot be read by torch"):
        build(str(tmp_path / "a.pt2"))
    with pytest.raises(UsageError, match="there is no file"):
        build(str(tmp_path / "b.pt2"))


def test_a_program_of_two_inputs_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    x = torch.zeros(2, 3, 8, 8)
    torch.export.save(torch.export.export(Two(), (x, x)), tmp_path / "two.pt2")
    with pytest.raises(UsageError, match=r"takes \[2, 3, 8, 8\], .*accepted: one batch of images"):
        build(str(tmp_path / "two.pt2"))
    with pytest.raises(UsageError, match="takes no arguments"):
        build(f"{tmp_path / 'two.pt2'}?width=3")
