"""fuse, unfuse, fused: what they promise for a user's model, whatever happens to it later."""

import copy
import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fuse_models import conv_bn, images, is_fused, network, require_same
from graphs import error
from resfuse.kernels import explain, fuse, fused, unfuse
from resfuse.kernels.ops.tolerance import EAGER_FACTOR
from scope import Scope

pytestmark = pytest.mark.slow

# What stays as it was


def test_names_classes_and_parameters_stay() -> None:
    model = network()
    fused_model = fuse(model)
    assert list(fused_model.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused_model.named_modules()] == [n for n, _ in model.named_modules()]
    assert isinstance(fused_model.layer1[0], type(model.layer1[0]))
    assert fused_model is not model and not is_fused(model)
    assert fuse(model, inplace=True) is model and is_fused(model)


def test_state_dicts_load_strictly_both_ways() -> None:
    model, other = network(), network(seed=5)
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(images())
    fused_model.load_state_dict(other.state_dict(), strict=True)
    require_same(fused_model, other, images())
    model.load_state_dict(fused_model.state_dict(), strict=True)
    assert torch.equal(model(images()), other(images()))


def test_unfuse_gives_back_the_same_bits() -> None:
    model = network()
    before = model(images())
    fused_model = fuse(model, inplace=True)
    with torch.no_grad():
        fused_model(images())
    assert torch.equal(unfuse(fused_model)(images()), before)
    assert type(model) is type(network())


def test_fused_is_fused_inside_only() -> None:
    model = network()
    with fused(model) as same:
        assert same is model and is_fused(model)
    assert not is_fused(model)
    with pytest.raises(RuntimeError, match="stop"), fused(model):
        raise RuntimeError("stop")
    assert not is_fused(model)


def test_fusing_twice_is_fusing_once() -> None:
    once = fuse(network())
    twice = fuse(once)
    assert type(twice) is type(once)
    require_same(twice, network(), images())


# Training


def test_training_mode_is_the_original() -> None:
    model = network()
    fused_model = fuse(model)
    outputs = []
    for one in (model.train(), fused_model.train()):
        y = one(images())
        y.square().mean().backward()
        outputs.append(y)
    assert torch.equal(*outputs)
    for (name, a), b in zip(
        model.state_dict().items(), fused_model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for a, b in zip(model.parameters(), fused_model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_folded_weights_follow_an_optimizer() -> None:
    model = network()
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(images())
    for one in (model, fused_model):
        optimizer = torch.optim.SGD(one.train().parameters(), lr=0.1, momentum=0.9)
        for seed in range(2):
            optimizer.zero_grad()
            one(images(seed)).square().mean().backward()
            optimizer.step()
        one.eval()
    require_same(fused_model, model, images())


@pytest.mark.parametrize(
    "which", ["conv1.weight", "bn1.weight", "bn1.running_var", "layer1.0.bn2.bias"]
)
def test_folded_weights_follow_a_write_in_place(which: str) -> None:
    model = network()
    fused_model = fuse(model)
    with torch.no_grad():
        before = fused_model(images())
        for one in (model, fused_model):
            one.state_dict()[which].mul_(1.5)
        assert error(fused_model(images()), before) > 1e-3
    require_same(fused_model, model, images())


def test_eval_mode_gradients_are_the_originals_and_say_so() -> None:
    model = network()
    fused_model = fuse(model)
    with pytest.warns(UserWarning, match="gradients are enabled") as warned:
        fused_model(images()).square().mean().backward()
    assert {warning.filename for warning in warned} == {__file__}  # the caller's line
    model(images()).square().mean().backward()
    for a, b in zip(model.parameters(), fused_model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_frozen_parameters_still_give_the_input_its_gradient() -> None:
    model = network().requires_grad_(False)
    fused_model = fuse(model)
    grads = []
    for one in (model, fused_model):
        x = images().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one(x).square().mean().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_an_inner_batch_norm_in_training_mode_is_respected() -> None:
    model = network()
    fused_model = fuse(model)
    for one in (model, fused_model):
        one.layer2[0].bn1.train()
    with torch.no_grad():
        assert error(fused_model(images()), model(images())) < 1e-5
    moved = fused_model.layer2[0].bn1.running_mean
    assert torch.allclose(moved, model.layer2[0].bn1.running_mean, atol=1e-5)
    assert not torch.equal(moved, network().layer2[0].bn1.running_mean)


# Moving and copying


@pytest.mark.parametrize("dtype, mode", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_follows_a_change_of_dtype(dtype: torch.dtype, mode: str) -> None:
    model = network()
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(images())
    require_same(fused_model.to(dtype), model.to(dtype), images().to(dtype), mode)


def test_computes_in_fp64() -> None:
    model = network().double()
    with torch.no_grad():
        assert error(fuse(model)(images().double()), model(images().double())) < 1e-14


def test_follows_a_change_of_memory_format() -> None:
    model = network()
    fused_model = fuse(model).to(memory_format=torch.channels_last)
    require_same(fused_model, model, images().to(memory_format=torch.channels_last))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(how: str) -> None:
    fused_model = fuse(network())
    with torch.no_grad():
        before = fused_model(images())
        if how == "deepcopy":
            other = copy.deepcopy(fused_model)
        else:
            file = io.BytesIO()
            torch.save(fused_model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert type(other) is type(fused_model) and is_fused(other)
        assert torch.equal(other(images()), before)
        other.conv1.weight.zero_()
        assert not torch.equal(other(images()), before)
        assert torch.equal(fused_model(images()), before)


def test_a_copy_leaves_alone_what_was_left() -> None:
    shared = nn.Conv2d(8, 8, 1)
    inner = Scope(lambda m, x: m.bn(m.conv(x)), conv=shared, bn=nn.BatchNorm2d(8))
    model = Scope(lambda m, x: m.inner(m.body(x)) + m.again(x), inner=inner, again=shared,
                  body=Scope(lambda m, x: m.bn(m.conv(x)), **conv_bn())).eval()  # fmt: skip
    for one in (fuse(model), copy.deepcopy(fuse(model))):
        how = {line.name: line.how for line in explain(one, images(shape=(1, 8, 5, 5))).lines}
        assert "shared" in how["inner.conv"] and how["body.conv"] == "conv + bn"


def test_inference_tensors_as_weights() -> None:
    with torch.inference_mode():
        model = network()
        fused_model = fuse(model)
        assert error(fused_model(images()), model(images())) < 1e-5


def test_functional_call_uses_the_weights_given() -> None:
    model, other = network(), network(seed=7)
    weights = dict(other.state_dict())
    with torch.no_grad():
        got = torch.func.functional_call(fuse(model), weights, (images(),))
        assert error(got, other(images())) < 1e-5


def test_discarded_weights_answer_and_refuse_the_rest() -> None:
    model = network()
    fused_model = fuse(model, discard_weights=True)
    require_same(fused_model, model, images())
    require_same(fused_model, model, images(shape=(1, 3, 50, 40)))
    held = sum(p.numel() for p in fused_model.parameters() if p.device.type != "meta")
    assert held < sum(p.numel() for p in model.parameters()) / 100
    refused = [
        lambda: unfuse(fused_model),
        lambda: copy.deepcopy(fused_model),
        lambda: fused_model.train()(images()),
        lambda: fused_model.eval()(images().double()),
    ]
    for act in refused:
        with pytest.raises(RuntimeError, match="discard_weights=True"), torch.no_grad():
            act()
    require_same(fused_model, model, images())


# Tools that look inside


def test_flop_counter_sees_every_convolution() -> None:
    model = network()
    counts = []
    for one in (model, fuse(model)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_vmap_and_jit_trace_run_the_layers() -> None:
    model = network().requires_grad_(False)
    fused_model = fuse(model)
    stacked = torch.stack([images(0), images(1)])
    assert error(torch.vmap(fused_model)(stacked), torch.vmap(model)(stacked)) < 1e-5
    traced = torch.jit.trace(fused_model, images())
    assert error(traced(images(3)), model(images(3))) < 1e-5


def test_autocast_computes_in_its_dtype() -> None:
    model = network()
    fused_model = fuse(model)
    reference = copy.deepcopy(model).double()(images().double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, got = model(images()), fused_model(images())
    assert got.dtype == plain.dtype == torch.bfloat16
    assert error(got, reference) <= EAGER_FACTOR * error(plain, reference) + 8e-3


def test_weights_are_discarded_while_several_threads_make_their_first_call() -> None:
    model, x = network(), images()
    with torch.inference_mode():
        wanted = model(x)
    for _ in range(5):
        fused_model = fuse(copy.deepcopy(model), discard_weights=True)
        together = threading.Barrier(4)

        def run(model: nn.Module = fused_model, together: threading.Barrier = together) -> None:
            together.wait()
            with torch.inference_mode():
                for _ in range(2):
                    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(run) for _ in range(4)]:
                done.result()
