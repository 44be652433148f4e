"""calibrate: what it finds is what the model computes, in memory that does not grow, from images
in any of the forms it takes; and what it refuses."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from engine_models import conv, images, made, maps, small
from resfuse.kernels import Ranges, calibrate
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.quantization.calibration import Calibration
from scope import Scope

pytestmark = pytest.mark.usefixtures("kept_exports")

SHAPE = (40, 3, 33, 29)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(small)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return images(*SHAPE) + 0.25


@pytest.fixture(scope="module")
def expected(model: nn.Module, photos: Tensor) -> Ranges:
    return calibrate(model, photos)


def layers(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The values of `small` by the name that the graph has for them, by torch alone, in fp64."""
    s: Any = model
    with torch.no_grad():
        stem = s.stem(x).relu()
        pool = s.pool(stem)
        y = (s.norm(s.conv(pool)) + s.projection(pool)).relu()
        z = torch.tanh(s.grouped(y))
        both = torch.cat([y, z], 1)
        mean = both.mean((2, 3))
        return {
            "x": x, "relu": stem, "max_pool2d": pool, "relu_1": y, "conv2d_3": s.grouped(y),
            "tanh": z, "cat": both, "mean": mean, "linear": s.head(mean),
        }  # fmt: skip


def test_ranges_and_means_are_those_of_the_layers(model: nn.Module, photos: Tensor) -> None:
    """40 images in batches of 16 leave a last one of 8."""
    found = calibrate(model, photos, batch_size=16)
    exact = layers(made(small).double(), photos.double())
    graph, _ = capture(model, photos[:1])
    assert set(found.values) == set(graph.values) and set(exact) <= set(found.values)
    for name, value in exact.items():
        seen = found.values[name]
        assert seen.low == pytest.approx(float(value.min()), rel=1e-5, abs=1e-5)
        assert seen.high == pytest.approx(float(value.max()), rel=1e-5)
        assert seen.clipped == 0
        assert seen.means is not None
        means = value.mean([d for d in range(value.dim()) if d != 1])
        torch.testing.assert_close(torch.tensor(seen.means).double(), means, rtol=1e-5, atol=1e-6)
    assert found.images == 40 and found.image == SHAPE[1:] and found.method == "minmax"


def close(a: Ranges, b: Ranges, tolerance: float = 1e-4) -> None:
    assert (a.structure, a.images, a.image) == (b.structure, b.images, b.image)
    for name, value in a.values.items():
        other = b.values[name]
        span = value.high - value.low
        assert other.low == pytest.approx(value.low, abs=tolerance * span)
        assert other.high == pytest.approx(value.high, abs=tolerance * span)
        assert other.means == pytest.approx(value.means, rel=1e-3, abs=tolerance * span)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Has no end of its own but its length."""

    def __init__(self, photos: Tensor) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        return self.photos[at % len(self.photos)], 0


def reused(photos: Tensor) -> Iterator[Tensor]:
    """A loader that writes each batch into the memory of the one before."""
    memory = torch.empty(3, *photos.shape[1:])
    for part in photos.split(3):
        memory[: len(part)] = part
        yield memory[: len(part)]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a list of images": list,
    "a list of batches": lambda x: list(x.split(7)),
    "images and batches": lambda x: [x[0], x[1:20], *x[20:]],
    "a generator": lambda x: (part for part in x.split(9)),
    "memory that is reused": reused,
    "a DataLoader": lambda x: DataLoader(TensorDataset(x), batch_size=6),
    "with labels": lambda x: DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=6),
    "a data set": Pictures,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a function": lambda x: lambda m: [m(part) for part in x.split(11)],
    "a function in inference mode": lambda x: torch.inference_mode()(
        lambda m: [m(part.clone()) for part in x.split(11)]
    ),
    "a function with gradients": lambda x: lambda m: [m(x.clone().requires_grad_())],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_in_every_form(
    form: str, model: nn.Module, photos: Tensor, expected: Ranges
) -> None:
    close(expected, calibrate(model, FORMS[form](photos)))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_methods_clip_at_most_a_little(
    method: str, model: nn.Module, photos: Tensor, expected: Ranges
) -> None:
    found = calibrate(model, photos, method=method)
    assert found.method == method and found.percentile == (
        99.99 if method == "percentile" else None
    )
    for name, value in found.values.items():
        whole = expected.values[name]
        slack = 1e-5 * (whole.high - whole.low)
        assert whole.low - slack <= value.low <= value.high <= whole.high + slack
        assert value.clipped <= (3e-4 if method == "percentile" else 0.05)
    assert any(value.clipped > 0 for value in found.values.values())


def test_percentile_is_the_one_asked_for(model: nn.Module, photos: Tensor) -> None:
    found = calibrate(model, photos, method="percentile", percentile=90)
    assert found.values["x"].high == pytest.approx(
        float(torch.quantile(photos.flatten()[::20], 0.9)), abs=0.05
    )
    assert found.values["x"].clipped == pytest.approx(0.2, abs=0.01)


def test_samples_are_the_first_ones(model: nn.Module, photos: Tensor, expected: Ranges) -> None:
    beyond = torch.cat([photos, 100 + photos])
    close(expected, calibrate(model, beyond, samples=40))
    close(expected, calibrate(model, lambda m: [m(x) for x in beyond.split(25)], samples=40))
    taken = []

    def endless() -> Iterator[Tensor]:
        while True:
            taken.append(1)
            yield photos[:10]

    assert calibrate(model, endless(), samples=35).images == 35 and len(taken) == 4


def stored(calibration: Calibration) -> int:
    """The numbers that a calibration keeps of what it saw."""
    count = sum(part.numel() for part in calibration._waiting)
    for value in calibration.observed.values():
        count += value.histogram.counts.numel()
        count += 0 if value.sums is None else value.sums.numel()
    return count


def test_memory_does_not_grow_with_the_images(model: nn.Module) -> None:
    calibration = Calibration(model, None, 8, distribution=True)
    counts, alive = [], []
    for seed in range(6):
        batch = images(16, *SHAPE[1:], seed=seed) * 2.0**seed
        calibration.take(batch)
        alive.append(weakref.ref(batch))
        del batch
        gc.collect()
        counts.append(stored(calibration))
    assert len(set(counts)) == 1 and counts[0] > 4096
    assert not any(reference() is not None for reference in alive)
    names = {name for name, item in vars(calibration).items() if isinstance(item, list | dict)}
    assert names == {"observed", "_waiting", "_digests"}


def test_an_output_and_a_map_have_ranges() -> None:
    model = made(maps)
    found = calibrate(model, images(*SHAPE))
    assert len(found.values) == 4 and all(value.means for value in found.values.values())


def test_values_without_channels_have_no_means() -> None:
    model = made(
        lambda: Scope(lambda s, x: torch.tanh(s.c(x).flatten(2).transpose(1, 2)), c=conv())
    )
    found = calibrate(model, images(*SHAPE))
    assert [value.means is None for value in found.values.values()].count(True) >= 1


def test_values_of_other_dtypes_have_no_range() -> None:
    model = made(lambda: Scope(lambda s, x: s.c(x).argmax(1), c=conv()))
    found = calibrate(model, images(*SHAPE))
    assert len(found.values) == len(found.structure) == 2  # the image and the map


def test_autocast_changes_nothing(model: nn.Module, photos: Tensor, expected: Ranges) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        close(expected, calibrate(model, photos), 1e-6)


def test_inference_mode_changes_nothing(model: nn.Module, photos: Tensor, expected: Ranges) -> None:
    with torch.inference_mode():
        close(expected, calibrate(model, [part.clone() for part in photos.split(9)]), 1e-6)


def test_the_model_is_left_as_it_was(photos: Tensor) -> None:
    """By captures, too: of this one none is kept."""
    model = made(small)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, photos)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not model.training


def test_few_images_are_warned_about(model: nn.Module, photos: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"argument images: 31 of them; .* about 300") as found:
        calibrate(model, photos[:31])
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, photos[:32])


def with_number(at: int, number: float) -> Tensor:
    x = images(*SHAPE)
    x[at, 1, 2, 3] = number
    return x


def overflowing() -> nn.Module:
    return made(lambda: Scope(lambda s, x: s.c(x * 3e38), c=conv()))


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no images": ([], {}, "argument images: there is none"),
    "no images of a function": (lambda m: None, {}, "argument images: there is none"),
    "an empty tensor": (torch.empty(0, 3, 33, 29), {}, "argument images: batch 0 has shape"),
    "NaN": (with_number(17, float("nan")).split(8), {}, "argument images: batch 2 holds NaN"),
    "infinity": (with_number(0, float("inf")), {}, "argument images: batch 0 holds NaN or inf"),
    "constant images": (
        torch.arange(40.0).view(-1, 1, 1, 1).expand(*SHAPE), {},
        "argument images: every image is one number",
    ),
    "another shape": (
        [images(*SHAPE), images(2, 3, 32, 29)], {},
        r"batch 1 has images \[3, 32, 29\], and those before it \[3, 33, 29\]",
    ),
    "another dtype": ([images(*SHAPE).double()], {}, "batch 0 is torch.float64; accepted"),
    "bytes": ([torch.zeros(SHAPE, dtype=torch.uint8)], {}, "batch 0 is torch.uint8; accepted"),
    "a row": ([torch.zeros(4, 3)], {}, "batch 0 has shape"),
    "a word": ("photos", {}, "argument images: str; accepted: a tensor"),
    "a number": (3, {}, "argument images: int; accepted: a tensor"),
    "numbers": ([1, 2], {}, "argument images: batch 0 is a int; accepted: a tensor"),
    "dicts": ([{"x": images(*SHAPE)}], {}, "argument images: batch 0 is a dict; accepted"),
    "two arguments": (
        lambda m: m(images(*SHAPE), 3), {}, "argument images: it calls the model with 2 arguments",
    ),
    "method": (images(*SHAPE), {"method": "max"}, "argument method: 'max'; accepted: minmax, p"),
    "samples": (images(*SHAPE), {"samples": 0}, "argument samples: 0; accepted: 1 and more"),
    "samples of a bool": (images(*SHAPE), {"samples": True}, "argument samples: True; accepted"),
    "batch size": (images(*SHAPE), {"batch_size": 0}, "argument batch_size: 0; accepted"),
    "no batch size": (images(*SHAPE), {"batch_size": None}, "argument batch_size: None; accepted"),
    "percentile": (images(*SHAPE), {"percentile": 0.9999}, "argument percentile: 0.9999; accepted"),
    "percentile of NaN": (
        images(*SHAPE), {"percentile": float("nan")}, "argument percentile: nan; accepted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, model: nn.Module) -> None:
    given, settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        calibrate(model, given, **settings)
    assert not model._forward_pre_hooks


BAD_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "training": (lambda: made(small).train(), "argument model: it is in training mode"),
    "a function": (lambda: torch.relu, "argument model: .*accepted: a torch.nn.Module"),
    "double": (lambda: made(small).double(), "argument model: .* is torch.float64; accepted"),
    "bfloat16": (lambda: made(small).bfloat16(), "argument model: .* is torch.bfloat16; accepted"),
    "meta": (lambda: made(small).to("meta"), "argument model: .* is on meta; accepted: on the CPU"),
    "overflow": (
        overflowing,
        "argument model: its value .*, on images 0 to 15: it holds NaN or inf",
    ),
    "no export": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x) if x.sum() > 0 else x, c=conv())),
        "argument model: Scope cannot be exported",
    ),
    "batches that differ": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x).relu() if len(x) > 4 else s.c(x), c=conv())),
        "argument images: for the last 2 the model computes something else",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused(case: str) -> None:
    make, message = BAD_MODELS[case]
    with pytest.raises(ValueError, match=message):
        calibrate(make(), images(34, *SHAPE[1:]))
