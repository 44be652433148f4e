"""Networks that return several tensors, of other images than photographs of three channels: each
output is checked by itself."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.backends import load_build
from resfuse.bench.cli import main
from resfuse.bench.common.errors import CannotTake
from resfuse.bench.measuring import correctness, photographs
from resfuse.bench.measuring.correctness import Limit, WrongAnswer
from resfuse.bench.measuring.inference import Checked, answers
from resfuse.bench.measuring.measure_case import require_logits
from resfuse.bench.measuring.probes.roofline import cost, cost_of_run
from resfuse.resnet_ref import create

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, bands=12):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(bands, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        y = self.stem(x)
        return {"map": y, "scores": [self.head(y.mean((2, 3)))]}


def net(bands=12):
    return Net(bands)
"""


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.register_buffer("anchors", torch.arange(6.0).view(3, 2))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"map": y, "logits": self.head(y.mean((2, 3))), "anchors": self.anchors}


@pytest.fixture
def batches() -> list[Tensor]:
    return [photographs.batch("bundled", 2, 16, seed) for seed in range(3)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Several().eval()


def checked(run: Callable[[Tensor], Any], model: nn.Module, batches: list[Tensor]) -> Checked:
    subject = Checked(lambda _: run, "contiguous", batches)
    subject.set_up()
    subject.expect(answers(model, batches, "ieee"))
    return subject


def test_every_output_is_checked(model: nn.Module, batches: list[Tensor]) -> None:
    subject = checked(torch.no_grad()(model), model, batches)
    for batch in range(3):
        found = subject.check(batch, "now")  # anchors are not overwritten between two checks
        assert found.rel_l2 < 1e-6
        assert found.top1_agree is None  # the first output is a map
    assert torch.equal(model.get_buffer("anchors"), torch.arange(6.0).view(3, 2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: {**y, "logits": y["logits"] * 1.01}, r"error 0.01 of output 2 against fp64 now"),
        (lambda y: {**y, "anchors": y["anchors"] + 1}, "of output 3 against fp64"),
        (lambda y: {**y, "map": y["map"].half()}, "dtype is torch.float16"),
        (lambda y: {"map": y["map"], "logits": y["logits"]}, r"the output is \{map: tensor, logi"),
        (lambda y: y["logits"], "the output is tensor, eager's is {map: tensor, logits: "),
        (lambda y: list(y.values()), r"the output is \[tensor, tensor, tensor\], eager's is"),
    ],
)
def test_one_wrong_output_fails(
    wrong: Callable[[Any], Any], said: str, model: nn.Module, batches: list[Tensor]
) -> None:
    subject = checked(torch.no_grad()(lambda x: wrong(model(x))), model, batches)
    with pytest.raises(WrongAnswer, match=said):
        subject.check(0, "now")


def test_an_output_that_is_kept_is_found_out(model: nn.Module, batches: list[Tensor]) -> None:
    kept: list[Any] = []

    @torch.no_grad()
    def run(images: Tensor) -> Any:
        answer = model(images)
        kept.append(answer)
        return {**answer, "map": kept[0]["map"]}

    subject = checked(run, model, batches)
    with pytest.raises(WrongAnswer, match="relative error nan of output 1"):
        subject.check(1, "now")


def test_each_output_has_its_own_limit() -> None:
    limit = Limit.from_eager(0.0, "ieee", 0.1)
    assert limit.each[1] == pytest.approx(limit.rel_l2 + 0.2)
    with pytest.raises(WrongAnswer, match="of output 1"):
        correctness.require_right([0.1, 0.1], limit, "now")
    correctness.require_right([0.0, 0.1], limit, "now")


def test_where_much_is_allowed_every_image_must_tell_batches_apart() -> None:
    """An error of 20 % is allowed: the answer to another batch must be off by 30 %."""
    limit = correctness.Limit(0.2)
    one, far = torch.eye(2), torch.eye(2) + torch.tensor([[0.0, 0.35], [0.35, 0.0]])
    correctness.require_telling([one, far], limit)
    near = torch.eye(2) + torch.tensor([[0.0, 0.35], [0.25, 0.0]])
    with pytest.raises(WrongAnswer, match="cannot tell inputs apart"):
        correctness.require_telling([far, one, near], limit)
    with pytest.raises(WrongAnswer, match="cannot tell inputs apart"):
        correctness.require_telling([one, far, one], limit)
    once = torch.eye(2) + torch.tensor([[0.0, 0.7], [0.0, 0.0]])
    correctness.require_telling([one, once], correctness.Limit(0.05))  # ten times, in one image


def test_a_zero_row_is_right_only_where_it_is_zero() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert correctness.relative_error(zero, zero) == 0.0
    assert correctness.relative_error(one, zero) == float("inf")
    assert correctness.relative_error(zero * float("nan"), zero) != 0.0


@pytest.mark.parametrize("backend", ["fused", "onnxrt", "openvino"])
def test_backends_give_dictionaries_as_the_network_does(
    backend: str, model: nn.Module, batches: list[Tensor]
) -> None:
    with torch.inference_mode():
        wanted = model(batches[0])
    got = load_build(backend)(model, batches[0])(batches[0])
    assert list(got) == list(wanted)
    for key in wanted:
        assert correctness.relative_error(got[key], wanted[key]) < 1e-5, key


def test_the_engine_says_what_it_cannot_take(model: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(CannotTake, match=r"the engine: .*anchors"):
        load_build("engine")(model, batches[0])


def test_training_wants_logits(model: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(CannotTake, match="the network returns several tensors"):
        require_logits(model, batches[0])


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "cifar_preact164"])
def test_the_count_of_a_run_is_that_of_the_meta_device(name: str) -> None:
    counted = cost(create(name, device="meta").eval(), 32)
    assert cost_of_run(create(name).eval(), torch.zeros(2, 3, 32, 32)) == counted


@pytest.mark.parametrize("channels", [1, 2, 12])
def test_photographs_have_the_channels_that_are_asked_for(channels: int) -> None:
    images = photographs.batch("bundled", 2, (16, 24), 0, channels)
    assert images.shape == (2, channels, 16, 24)
    flat = images.transpose(0, 1).flatten(1)
    assert len({float(band.sum()) for band in flat}) == channels  # no band is another's copy
    assert bool((flat.std(1) > 0.1).all())


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_twelve_bands_go_from_a_file_to_rows_and_are_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    command = [
        "bench", "-m", "./net.py:net", "--input-shape", "12,32,40", "--backend",
        "eager,engine", "--channels-last", "-b", "2", "--seconds", "0.05", "--device", "cpu",
        "--results", "r",
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    (file,) = Path("r").glob("*/rows.csv")
    rows = pd.read_csv(file)
    assert list(rows["status"]) == ["pass", "pass"], list(rows["error"])
    assert set(rows["input_shape"]) == {"12x32x40"}
    assert set(rows["weights"]) == {"own"}
    assert all(origin.startswith("net.py sha256:") for origin in rows["origin"])
    assert len(set(rows["weights_sha256"])) == 1
    assert rows["weights_sha256"].str.len().eq(64).all()
    capsys.readouterr()
    assert main([*command, "--resume", "--dry-run"]) == 0
    assert "0 cases, 2 already settled" in capsys.readouterr().out
    Path("net.py").write_text(NET + "\n# another version\n")
    assert main([*command, "--resume", "--dry-run"]) == 0
    assert "2 cases" in capsys.readouterr().out


def test_signal_to_noise_and_divergence_of_the_worst_image() -> None:
    """Errors of a tenth and a hundredth: 20 and 40 dB. Softmaxes of 1/2, 1/2 and 3/4, 1/4."""
    reference = torch.tensor([[3.0, 4.0], [0.0, 10.0]], dtype=torch.float64)
    found = correctness.accuracy(torch.tensor([[3.3, 4.4], [0.0, 10.1]]), reference, reference)
    assert found.sqnr_db == pytest.approx(20, abs=1e-4)
    even, uneven = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    found = correctness.accuracy(even, uneven.double(), uneven)
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_what_has_no_noise_or_no_classes_has_no_such_number() -> None:
    same = correctness.accuracy(torch.ones(2, 3), torch.ones(2, 3).double(), torch.ones(2, 3))
    assert (same.sqnr_db, same.kl) == (None, 0)
    maps = correctness.accuracy(torch.ones(1, 2, 2), torch.zeros(1, 2, 2).double(), torch.ones(1))
    assert (maps.sqnr_db, maps.kl) == (None, None)
    worse = correctness.Accuracy(0.1, 0.1, 0.1, 1.0, 20.0, 0.5)
    worst = correctness.worst([same, worse, correctness.Accuracy(0.01, 0.1, 0.1, 1.0, 40.0, 0.1)])
    assert (worst.sqnr_db, worst.kl) == (20, 0.5)
