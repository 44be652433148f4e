"""How the studies train: the networks, and the recipe."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from resfuse.bench.trainings import data, recipe
from resfuse.bench.trainings.training_run import PLAIN, Run, build

RUN = Run("digits", "A", 8, seed=0, epochs=2, batch_size=64, learning_rate=0.02)


def test_a_seed_gives_the_same_network_to_the_bit(few: data.Data, one_thread: None) -> None:
    first, again = recipe.train(RUN, few, "cpu"), recipe.train(RUN, few, "cpu")
    assert first == again
    assert recipe.train(replace(RUN, seed=1), few, "cpu").train_loss != first.train_loss


def test_training_learns(few: data.Data) -> None:
    done = recipe.train(replace(RUN, epochs=8, batch_size=16), few, "cpu")
    assert done.train_error < 0.3 < done.train_curve[0]
    assert len(done.train_curve) == len(done.test_curve) == 8
    assert done.test_error == done.test_curve[-1]


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_plain_and_residual_differ_in_shortcuts_alone(depth: int) -> None:
    def count(shortcut: str) -> int:
        return sum(
            p.numel() for p in build(replace(RUN, shortcut=shortcut, depth=depth)).parameters()
        )

    blocks = (depth - 2) // 6
    widening = 16 * 32 + 32 * 64 + 2 * (32 + 64)  # two 1x1 projections and their batch norms
    same = sum(blocks * (w * w + 2 * w) for w in (16, 32, 64)) - sum(
        w * w + 2 * w for w in (32, 64)
    )
    assert count(PLAIN) == count("A")
    assert count("B") - count("A") == widening
    assert count("C") - count("A") == widening + same


def test_the_seeds_of_plain_and_residual_networks_draw_the_same_weights() -> None:
    plain, residual = (build(replace(RUN, shortcut=s)).state_dict() for s in (PLAIN, "A"))
    assert plain.keys() == residual.keys()
    assert all(torch.equal(plain[name], residual[name]) for name in plain)


def test_the_schedule() -> None:
    def rates(depth: int, warm: int) -> list[float]:
        run = replace(RUN, depth=depth, epochs=8)
        return [recipe.learning_rate(run, epoch, epoch < warm) for epoch in range(8)]

    assert rates(20, 0) == pytest.approx([2e-2] * 4 + [2e-3] * 2 + [2e-4] * 2)
    assert rates(110, 1) == pytest.approx([2e-3] + [2e-2] * 3 + [2e-3] * 2 + [2e-4] * 2)


def test_shifted_images_are_crops_of_the_framed_image() -> None:
    images = torch.arange(64 * 2 * 4 * 4, dtype=torch.float32).reshape(64, 2, 4, 4) + 1
    generator = torch.Generator().manual_seed(0)
    moved = recipe.shifted(images, 1, True, generator)
    seen = set()
    for image, result in zip(images, moved, strict=True):
        framed = F.pad(image, (1, 1, 1, 1))
        crops = {
            (down, right, mirrored): crop.flip(-1) if mirrored else crop
            for down in range(3)
            for right in range(3)
            for crop in [framed[:, down : down + 4, right : right + 4]]
            for mirrored in (False, True)
        }
        (found,) = [where for where, crop in crops.items() if torch.equal(crop, result)]
        seen.add(found)
    assert len(seen) > 12  # of 18
    assert not torch.equal(recipe.shifted(images, 1, False, generator), images)
    assert torch.equal(recipe.shifted(images, 0, False, generator), images)


def test_gradient_norms_are_those_of_the_layers_and_leave_the_model(few: data.Data) -> None:
    model = build(replace(RUN, shortcut="B"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = recipe.preparation(few, "cpu")(few.train.images[:32])
    norms = recipe.gradient_norms(model, images, few.train.labels[:32])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(norms) == 8  # layers; projections are none
    F.cross_entropy(model(images), few.train.labels[:32]).backward()
    assert model.conv1.weight.grad is not None and model.fc.weight.grad is not None
    assert norms[0] == pytest.approx(float(model.conv1.weight.grad.norm()))
    assert norms[-1] == pytest.approx(float(model.fc.weight.grad.norm()))


def test_gradients_grow_towards_the_input_of_a_deep_plain_network_alone(few: data.Data) -> None:
    images = recipe.preparation(few, "cpu")(few.train.images[:64])

    def growth(shortcut: str) -> float:
        model = build(replace(RUN, shortcut=shortcut, depth=56))
        norms = recipe.gradient_norms(model, images, few.train.labels[:64])
        return norms[0] / norms[-1]

    assert growth(PLAIN) > 20 * growth("A")  # 1e3 against 8, of seed 0


def test_prepared_images_have_no_mean_and_unit_spread(few: data.Data) -> None:
    prepared = recipe.preparation(few, "cpu")(few.train.images)
    assert prepared.mean(0).abs().max() < 1e-5
    assert float(prepared.square().mean()) == pytest.approx(1)
