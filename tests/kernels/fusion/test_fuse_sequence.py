"""In a sequence of blocks, each may add in place to its own input, which has no other reader."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fuse_models import images
from graphs import error
from resfuse.kernels import FusedBottleneck, fuse, unfuse


class Keeper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return x


def blocks(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    stages = [FusedBottleneck(16, 4), *between, FusedBottleneck(16, 4), FusedBottleneck(16, 4)]
    return nn.Sequential(*stages).eval()


def test_residuals_are_added_in_place_where_nobody_looks(conv_class: type) -> None:
    model = fuse(blocks())
    x = images(shape=(2, 16, 6, 5)).to(memory_format=torch.channels_last)
    before = x.clone()
    seen = []
    with torch.no_grad():
        want = unfuse(copy.deepcopy(model))(x)
        run = conv_class.add
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                conv_class,
                "add",
                lambda self, x, r, overwrite: seen.append(overwrite) or run(self, x, r, overwrite),
            )
            got = model(x)
    assert seen == [False, True, True]  # the first block's input is the caller's
    assert torch.equal(x, before)
    assert error(got, want) < 1e-6


def test_the_straight_run_is_the_checked_one(conv_class: type) -> None:
    """The second run of a shape leaves out the checks; another shape, layout or weight has them."""
    plain = unfuse(blocks())
    model = fuse(plain)
    inputs = [images(seed, (2, 16, 6, 5)) for seed in (1, 2)]
    inputs += [images(3, (2, 16, 6, 5)).to(memory_format=torch.channels_last)] * 2
    inputs += [images(4, (1, 16, 3, 8))] * 2 + [images(5, (0, 16, 6, 5))] + inputs[:1]
    with torch.no_grad():
        for x in inputs:
            assert torch.allclose(model(x), plain(x), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                assert model(inputs[0]).dtype == torch.bfloat16
        assert torch.allclose(model(inputs[0]), plain(inputs[0]), atol=1e-5)
        for one in (model, plain):
            one[1].conv2.weight.mul_(2)
        assert torch.allclose(model(inputs[0]), plain(inputs[0]), atol=1e-5)
        model.double(), plain.double()
        assert torch.allclose(model(inputs[0].double()), plain(inputs[0].double()))


def test_what_somebody_keeps_is_not_written_over() -> None:
    keeper = Keeper()
    model = fuse(blocks(keeper))
    keeper = model[1]
    with torch.no_grad():
        want = unfuse(copy.deepcopy(model))
        x = images(shape=(1, 16, 6, 5))
        y = want(x)
        kept = want[1].kept
        assert error(model(x), y) < 1e-6
    assert error(keeper.kept, kept) < 1e-6


def test_outputs_a_hook_keeps_are_not_written_over() -> None:
    model = fuse(blocks())
    kept = []
    model[0].register_forward_hook(lambda m, args, y: kept.append(y))
    with torch.no_grad():
        x = images(shape=(1, 16, 6, 5))
        model(x)
        assert torch.equal(kept[0], model[0](x))


def test_blocks_called_by_hand_keep_their_input() -> None:
    model = fuse(blocks())
    x = images(shape=(1, 16, 6, 5)).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        y = model[0](x)
        held = y.clone()
        model[1](y)
    assert torch.equal(x, before) and torch.equal(y, held)
