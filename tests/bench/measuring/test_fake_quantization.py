"""The simulation of int8 that the gate judges by: hand-computed values, and what it reaches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.bench.backends.compute import Compute, windows
from resfuse.bench.measuring.fake_quantization import (
    FakeQuantized,
    Range,
    rounded_values,
    rounded_weight,
)


def seen(*values: float) -> Range:
    found = Range()
    found.take(torch.tensor(values))
    return found


def test_a_range_holds_zero_and_grows() -> None:
    found = seen(2.0, 5.0)
    assert (found.low, found.high) == (0.0, 5.0)
    found.take(torch.tensor([-1.0, 3.0]))
    assert (found.low, found.high) == (-1.0, 5.0)


def test_values_are_rounded_to_256_steps_and_clipped() -> None:
    """Of [0, 25.5] the step is 0.1; of [-5.1, 20.4] too, with 51 steps below zero."""
    x = torch.tensor([0.0, 0.04, 0.06, 1.26, 25.5, 30.0, -2.0])
    assert rounded_values(x, seen(25.5)).tolist() == pytest.approx(
        [0, 0, 0.1, 1.3, 25.5, 25.5, 0], abs=1e-6
    )
    assert rounded_values(x, seen(-5.1, 20.4)).tolist() == pytest.approx(
        [0, 0, 0.1, 1.3, 20.4, 20.4, -2.0], abs=1e-6
    )


def test_what_is_always_zero_stays_so() -> None:
    assert rounded_values(torch.zeros(3), seen(0.0)).tolist() == [0, 0, 0]
    assert rounded_weight(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_weights_are_rounded_by_output_channel() -> None:
    """Steps of 12.7 / 127 = 0.1 and of 1."""
    weight = torch.tensor([[12.7, -0.26], [127.0, 3.4]])
    assert rounded_weight(weight).flatten().tolist() == pytest.approx([12.7, -0.3, 127, 3])
    assert rounded_weight(weight.T.contiguous(), 1).flatten().tolist() == pytest.approx(
        [12.7, 127, -0.3, 3]
    )


def test_a_layer_reads_rounded_values_and_weights() -> None:
    """One pixel of two channels: values of step 0.1, weights of steps 0.1 and 1, bias as it is."""
    layer = nn.Conv2d(2, 2, 1)
    layer.weight.data = torch.tensor([[12.7, -0.26], [127.0, 3.4]]).reshape(2, 2, 1, 1)
    layer.bias.data = torch.tensor([0.5, 0.25])
    calibration = torch.tensor([[25.5, 0.0], [1.0, 2.0]]).reshape(2, 2, 1, 1)
    lower = FakeQuantized(layer, calibration, 1)
    y = lower(torch.tensor([1.26, 0.52]).reshape(1, 2, 1, 1))
    assert y.flatten().tolist() == pytest.approx(
        [12.7 * 1.3 - 0.3 * 0.5 + 0.5, 127 * 1.3 + 3 * 0.5 + 0.25]
    )
    assert torch.equal(layer(calibration), F.conv2d(calibration, layer.weight, layer.bias))


class Everything(nn.Module):
    """One layer called twice, calls by name, a transposed convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x).relu())
        x = self.up(F.conv2d(input=x, weight=self.weight))
        return self.head(x.mean((2, 3)))


class Sums(nn.Module):
    """A shortcut, added in a way; a bias and a number are none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        branch = 2 * x + 1
        if self.how == "operator":
            y = branch + x
        elif self.how == "function":
            y = torch.add(branch, x)
        elif self.how == "in place":
            branch += x
            y = branch
        else:
            branch.add_(x)
            y = branch
        return y + torch.zeros(1)


@pytest.mark.parametrize("how", ["operator", "function", "in place", "method"])
def test_a_sum_of_maps_reads_rounded_values(how: str) -> None:
    """Steps of 0.1 for x in [0, 25.5], and of 52 / 255 for the branch in [0, 52]."""
    lower = FakeQuantized(Sums(how), torch.tensor([25.5, 0.0]).reshape(1, 2, 1, 1), 1)
    assert [(one.low, one.high) for one in lower._ranges] == [(0, 52), (0, 25.5)]
    x = torch.tensor([1.26, 0.52]).reshape(1, 2, 1, 1)
    step = 52 / 255
    wanted = [round(3.52 / step) * step + 1.3, round(2.04 / step) * step + 0.5]
    assert lower(x).flatten().tolist() == pytest.approx(wanted)
    assert x.flatten().tolist() == pytest.approx([1.26, 0.52])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_layer_is_rounded_once_by_ranges_of_its_own(size: int) -> None:
    torch.manual_seed(0)
    model, calibration = Everything().eval(), torch.randn(4, 4, 8, 8)
    lower = FakeQuantized(model, calibration, size)
    assert len(lower._ranges) == 5
    with torch.inference_mode():
        x = calibration[:2]
        exact, got = model.double()(x.double()), lower._model.float() and lower(x)
    error = float((got.double() - exact).norm() / exact.norm())
    assert 1e-3 < error < 5e-2


def test_batches_of_one_size_hold_every_photograph() -> None:
    images = torch.arange(5).float().reshape(5, 1)
    assert [one.flatten().tolist() for one in windows(images, 2)] == [[0, 1], [2, 3], [4, 0]]
    assert [one.flatten().tolist() for one in windows(images, 7)] == [[0, 1, 2, 3, 4, 0, 1]]


def test_an_example_is_made_of_the_calibration() -> None:
    calibration, measured = torch.arange(3.0).reshape(3, 1), torch.full((4, 1), 9.0)
    example = Compute(torch.int8, calibration).example(measured)
    assert example is not None and example.flatten().tolist() == [0, 1, 2, 0]
    assert Compute(torch.bfloat16).example(measured) is None
