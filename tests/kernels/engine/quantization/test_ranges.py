"""Ranges: what they store a value as, the models they fit, and files that may be a stranger's."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import conv, images, made, small
from resfuse.kernels import Ranges, calibrate
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.quantization.ranges import ValueRange
from resfuse.kernels.ops.quantization import dequantize, quantize
from scope import Scope

SHAPE = (32, 3, 33, 29)


@pytest.fixture(scope="module")
def ranges() -> Ranges:
    return calibrate(made(small), images(*SHAPE), method="percentile", percentile=99.5)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(small)


def graph_of(make: Callable[[], nn.Module], batch: int = 32) -> Graph:
    return capture(made(make), images(batch, *SHAPE[1:]))[0]


def of(low: float, high: float) -> Ranges:
    value = ValueRange(low, high, 0.0, None)
    return Ranges("minmax", None, 32, (3, 8, 8), (), {"v": value})


@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [
        (0.0, 2.55, 0), (1.0, 2.55, 0), (-1.0, 1.55, 100), (-2.55, 0.0, 255), (-2.55, -1.0, 255),
        (-1e-9, 1.0, 0), (-1.0, 1e-9, 255), (-3e38, 3e38, 128), (-1e30, 1e-30, 255),
    ],
)  # fmt: skip
def test_zero_is_exact_and_the_range_is_covered(low: float, high: float, zero_point: int) -> None:
    stored = of(low, high).quantization("v")
    assert stored.zero_point == zero_point
    assert float(dequantize(quantize(torch.zeros(1), stored), stored)) == 0.0
    for end in (low, high):  # no further off than half a step, and half a step of the zero point
        x = torch.tensor([end], dtype=torch.float64)
        assert abs(dequantize(quantize(x, stored), stored).double() - x) <= 1.001 * stored.scale


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-1e-44, 1e-44), (0.0, 1e-37)])
def test_a_value_that_is_zero_has_scale_one(low: float, high: float) -> None:
    assert of(low, high).quantization("v").scale == 1.0


def test_behind_a_relu_the_zero_point_is_zero() -> None:
    stored = of(-0.5, 2.55).quantization("v", non_negative=True)
    assert stored.zero_point == 0 and stored.scale == pytest.approx(0.01)
    assert of(-2.0, -1.0).quantization("v", non_negative=True).scale == 1.0


def test_a_value_without_a_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"argument name: 'w' has no range; .* another model"):
        of(0, 1).quantization("w")


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
def test_ranges_fit_every_batch_size(batch: int, ranges: Ranges) -> None:
    ranges.require_fits(graph_of(small, batch))


def with_view() -> nn.Module:
    """Has the batch size among the arguments of torch's operations, and a constant of its own."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        n, k, h, w = y.shape
        y = y.view(n, k // 2, 2, h, w).cumsum(2).reshape(n, k, h, w)
        return y + torch.ones(n, 1, 1, 1)

    return Scope(forward, c=conv())


def test_the_batch_among_arguments_makes_no_difference() -> None:
    found = calibrate(made(with_view), images(*SHAPE), batch_size=4)
    found.require_fits(graph_of(with_view, 4))
    found.require_fits(graph_of(with_view, 3))


def longer() -> nn.Module:
    return nn.Sequential(small(), nn.Linear(10, 4))


def renamed() -> nn.Module:
    return nn.Sequential(small())


def other_stride() -> nn.Module:
    model = small()
    model.stem.stride = (1, 1)  # type: ignore[union-attr, assignment]
    return model


def other_activation() -> nn.Module:
    model = small()
    model.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "longer": (longer, "ranges of another model: "),
    "renamed weights": (renamed, "another model: its relu has other settings, inputs or names"),
    "another stride": (other_stride, "another model: its relu has other settings"),
    "other groups": (other_activation, "another model: its .* has other settings"),
    "no norms": (lambda: nn.Sequential(conv(), nn.ReLU(), conv(16)), "another model: "),
    "another operation": (
        lambda: nn.Sequential(nn.Sigmoid()),
        "another model: its node 0 is relu, ",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_ranges_of_another_model_are_refused(case: str, ranges: Ranges) -> None:
    make, message = OTHERS[case]
    with pytest.raises(ValueError, match=f"argument calibration: .*{message}"):
        ranges.require_fits(graph_of(make))


def test_ranges_of_other_images_are_refused(ranges: Ranges) -> None:
    graph, _ = capture(made(small), images(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"of images \[3, 33, 29\]; this one takes \[3, 32, 32\]"):
        ranges.require_fits(graph)


def test_values_that_are_missing_or_have_other_channels_are_refused(
    ranges: Ranges, graph: Graph
) -> None:
    without = {name: value for name, value in ranges.values.items() if name != "cat"}
    with pytest.raises(ValueError, match="another model: cat has no range"):
        replace(ranges, values=without).require_fits(graph)
    short = replace(ranges.values["cat"], means=(0.0, 1.0))
    with pytest.raises(ValueError, match="another model: cat has 64 channels, not 2"):
        replace(ranges, values={**ranges.values, "cat": short}).require_fits(graph)
    with pytest.raises(ValueError, match=r"another model: it has \d+ nodes, and this one \d+"):
        replace(ranges, structure=ranges.structure[:-1]).require_fits(graph)


def test_the_digest_is_that_of_the_structure(ranges: Ranges) -> None:
    assert ranges.digest == replace(ranges, method="mse", images=5).digest
    assert ranges.digest != replace(ranges, structure=ranges.structure[:-1]).digest


def test_a_file_holds_the_same_ranges(ranges: Ranges, tmp_path: Path, graph: Graph) -> None:
    path = tmp_path / "ranges.json"
    ranges.save(path)
    again = Ranges.load(str(path))
    assert again == ranges
    again.require_fits(graph)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["method"] == "percentile"
    ranges.save(path)  # over itself


def test_an_earlier_file_stays_where_the_new_one_cannot_be_written(
    ranges: Ranges, tmp_path: Path
) -> None:
    path = tmp_path / "ranges.json"
    ranges.save(path)
    before = path.read_text()
    broken = replace(ranges, values={"v": ValueRange(0.0, float("inf"), 0.0, None)})
    with pytest.raises(ValueError):
        broken.save(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        ranges.save(tmp_path / "nowhere" / "ranges.json")


GOOD: dict[str, Any] = {
    "schema": 1, "method": "minmax", "percentile": None, "images": 32, "image": [3, 8, 8],
    "structure": [["conv2d", "0123456789abcdef"]],
    "values": {"x": {"low": -1.0, "high": 2, "clipped": 0.0, "means": [0.5, 0.25]},
               "conv2d": {"low": 0, "high": 0, "clipped": 0.5, "means": None}},
}  # fmt: skip
VALUE = GOOD["values"]["x"]


def with_value(**changed: Any) -> dict[str, Any]:
    return {**GOOD, "values": {"x": {**VALUE, **changed}}}


HOSTILE: dict[str, Any] = {
    "nothing": b"",
    "a list": b"[]",
    "no schema": {name: value for name, value in GOOD.items() if name != "schema"},
    "another schema": {**GOOD, "schema": 2},
    "a schema of another type": {**GOOD, "schema": True},
    "a field more": {**GOOD, "code": "import os"},
    "a field less": {name: value for name, value in GOOD.items() if name != "images"},
    "another method": {**GOOD, "method": "max"},
    "a method of another type": {**GOOD, "method": ["minmax"]},
    "a percentile beyond": {**GOOD, "percentile": 101},
    "no images": {**GOOD, "images": 0},
    "a share of an image": {**GOOD, "images": 1.5},
    "images without end": {**GOOD, "images": 2**40},
    "an image of words": {**GOOD, "image": ["3", 8, 8]},
    "an image of bools": {**GOOD, "image": [True, 8, 8]},
    "an empty image": {**GOOD, "image": []},
    "an image of many dimensions": {**GOOD, "image": [1] * 100},
    "a structure of words": {**GOOD, "structure": ["conv2d"]},
    "a structure of threes": {**GOOD, "structure": [["a", "b", "c"]]},
    "a structure without end": {**GOOD, "structure": [["a", "b"]] * 10_001},
    "a long name": {**GOOD, "structure": [["a" * 1001, "b"]]},
    "values in a list": {**GOOD, "values": [VALUE]},
    "values without end": {**GOOD, "values": {str(i): VALUE for i in range(10_001)}},
    "a long name of a value": {**GOOD, "values": {"a" * 1001: VALUE}},
    "no low": {**GOOD, "values": {"x": {"high": 1, "clipped": 0, "means": None}}},
    "one more": with_value(code=1),
    "low above high": with_value(low=3.0),
    "NaN": with_value(low=float("nan")),
    "infinity": with_value(high=float("inf")),
    "a large number": json.dumps(GOOD).replace("-1.0", "-1e999").encode(),
    "beyond float32": with_value(high=1e39),
    "a long integer": json.dumps(GOOD).replace('"high": 2', f'"high": 1{"0" * 400}').encode(),
    "digits without end": json.dumps(GOOD).replace('"high": 2', f'"high": 1{"0" * 9999}').encode(),
    "text": with_value(high="2"),
    "a bool": with_value(high=True),
    "more than all": with_value(clipped=1.5),
    "less than none": with_value(clipped=-0.1),
    "means of text": with_value(means=["0"]),
    "means of NaN": with_value(means=[float("nan")]),
    "one mean": with_value(means=0.5),
    "nested without end": b"[" * 100_000,
    "another encoding": b"\xff\xfe\x00{",
    "a pickle": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "half": json.dumps(GOOD)[:100].encode(),
    "random bytes": struct.pack("<64d", *range(64)),
}  # fmt: skip


def written(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_the_file_that_the_others_are_made_of_is_read(tmp_path: Path) -> None:
    ranges = Ranges.load(written(tmp_path / "good.json", GOOD))
    assert ranges.values["x"] == ValueRange(-1.0, 2.0, 0.0, (0.5, 0.25))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_strangers_file_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.json", HOSTILE[case])
    with pytest.raises(
        ValueError, match=r"argument path: .* holds no ranges, or damaged ones: "
    ) as e:
        Ranges.load(path)
    assert len(str(e.value)) < 400 + len(str(path)) and "\n" not in str(e.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"argument path: .*none.json does not exist"):
        Ranges.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"holds no ranges, or damaged ones: .*directory"):
        Ranges.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"holds no ranges, or damaged ones: .*pipe"):
        Ranges.load(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match=r"holds no ranges, or damaged ones: .*more than 64 MB"):
        Ranges.load(tmp_path / "large")
