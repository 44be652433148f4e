"""Weights from files of every layout people have, and the sentence for each file that is wrong."""

import argparse
import copy
import os
import re
import urllib.error
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from resfuse.resnet_ref import create, load_pretrained, load_weights


@pytest.fixture
def donor() -> nn.Module:
    return create("cifar_resnet20", seed=1)


@pytest.fixture
def model() -> nn.Module:
    return create("cifar_resnet20", seed=2)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    expected = theirs.state_dict()
    return all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        # What torchvision's references/classification/train.py writes.
        lambda state: {"model": state, "optimizer": {}, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": prefixed("module.", state)},
        lambda state: prefixed("_orig_mod.", state),
        lambda state: prefixed("_orig_mod.module.", state),
        lambda state: {"state_dict": prefixed("module._orig_mod.module.", state)},
        lambda state: {k: v for k, v in state.items() if "num_batches_tracked" not in k},
    ],
    ids=[
        "bare",
        "state_dict",
        "model and args",
        "ddp",
        "compiled",
        "compiled ddp",
        "nested",
        "no counters",
    ],
)
def test_checkpoints_load(tmp_path, donor, model, wrap):
    torch.save(wrap(donor.state_dict()), tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert same(model, donor)


def test_safetensors_load(tmp_path, donor, model):
    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    load_weights(model, str(tmp_path / "weights.safetensors"))
    assert same(model, donor)


def test_values_are_cast_to_the_models_dtype(tmp_path, donor, model):
    torch.save(copy.deepcopy(donor).half().state_dict(), tmp_path / "half.pth")
    load_weights(model, tmp_path / "half.pth")
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, donor.conv1.weight.half().float())


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2", "vgg19"])
@torch.no_grad()
def test_timms_files_load(tmp_path, name):
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    # In fp16, for VGG-19's file is half a gigabyte else; both networks then hold its values.
    torch.save(copy.deepcopy(theirs).half().state_dict(), tmp_path / "timm.pth")
    theirs.half().float()
    ours = create(name, device="meta").to_empty(device="cpu").eval()
    load_weights(ours, tmp_path / "timm.pth")
    images = torch.randn(1, 3, 64, 64)
    if name == "vgg19":
        images = torch.randn(1, 3, 224, 224)  # timm's VGG has no pooling before the classifier
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_a_backbone_ignores_the_classifier(tmp_path, donor):
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    backbone = create("cifar_resnet20", features_only=True, seed=2)
    load_weights(backbone, tmp_path / "weights.pth")
    assert same(backbone, donor)


def test_other_keys_are_named(tmp_path, donor, model):
    state = donor.state_dict()
    state["head.weight"] = state.pop("fc.weight")
    torch.save(state, tmp_path / "weights.pth")
    before = copy.deepcopy(model)
    message = (
        r"weights\.pth has other keys than the model: it lacks fc\.weight and adds head\.weight"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "weights.pth")
    assert same(model, before)  # all or nothing


HOSTILE = {
    "NaN": (lambda t: t * float("nan"), "holds values that are not finite"),
    "infinity": (lambda t: t / 0, "holds values that are not finite"),
    "sparse": (lambda t: t.to_sparse(), "is torch.sparse_coo; accepted: dense tensors"),
    "meta": (lambda t: t.to("meta"), "is on meta and has no numbers"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantized"),
    "complex": (lambda t: t.to(torch.complex64), "is torch.complex64; accepted: torch.float32"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_weight_is_refused_and_nothing_is_loaded(tmp_path, donor, model, kind):
    change, said = HOSTILE[kind]
    before = copy.deepcopy(model)
    state = donor.state_dict()
    torch.save({**state, "fc.weight": change(state["fc.weight"])}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"cannot be used: fc\.weight {said}") as refusal:
        load_weights(model, tmp_path / "w.pth")
    assert "\n" not in str(refusal.value) and same(model, before)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path, model, suffix):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46830571\n"
    (tmp_path / f"w.{suffix}").write_text(pointer)
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the file"):
        load_weights(model, tmp_path / f"w.{suffix}")


def test_a_long_list_of_keys_is_cut(tmp_path, model):
    torch.save(create("cifar_resnet32").state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match=r"adds layer1\.3\.conv1\.weight, \S+, \S+ and 69 more$"):
        load_weights(model, tmp_path / "deeper.pth")


def test_other_shapes_are_named(tmp_path, model):
    torch.save(create("cifar_resnet20", num_classes=100).state_dict(), tmp_path / "weights.pth")
    before = copy.deepcopy(model)
    message = (
        r"other shapes than the model: fc\.weight is \[100, 64\], the model's \[10, 64\]; fc\.b"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "weights.pth")
    assert same(model, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds no state_dict but a Tensor"),
        ([1, 2], "holds no state_dict but a list"),
        ({"epoch": 3}, "holds no state_dict: 'epoch' is a int, not a tensor"),
        ({1: torch.zeros(3)}, "holds no state_dict: 1 is a Tensor"),
        ({}, "it lacks conv1.weight, bn1.weight, bn1.bias and"),
        ({"state_dict": OrderedDict()}, "it lacks conv1.weight"),
    ],
)
def test_files_of_something_else_say_what_they_hold(tmp_path, model, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "weights.pth")


def test_code_in_a_file_is_not_run(tmp_path, model):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"conv1.weight": Attack()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"holds a Python object \(\w+\.mkdir\) besides tensors"):
        load_weights(model, tmp_path / "weights.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_corrupt_files_are_named(tmp_path, donor, model, suffix, damage):
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(donor.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no weights", "truncated": whole[:-2000]}[damage])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is (corrupt|not a readable)"):
        load_weights(model, path)


def test_a_path_without_a_file(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"weights file .*nothing\.pth does not exist"):
        load_weights(model, tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="is not a file"):
        load_weights(model, tmp_path)


def test_pretrained_weights_come_from_torchvisions_cache(tmp_path, monkeypatch):
    theirs = torchvision.models.resnet18()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    torch.save(theirs.state_dict(), cache / url.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ours = create("resnet18")
    load_pretrained("resnet18", ours)
    assert same(ours, theirs)
    with pytest.raises(ValueError, match=r"torchvision's ResNet18_Weights.* has other shapes.*fc"):
        load_pretrained("resnet18", create("resnet18", num_classes=10))


def test_without_a_network_the_way_out_is_named(tmp_path, monkeypatch):
    def no_network(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    message = r"resnet18 could not be fetched from https://.*not known.*--weights FILE needs no net"
    with pytest.raises(RuntimeError, match=message):
        load_pretrained("resnet18", create("resnet18", device="meta"))


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet50_v1", "nonsense"])
def test_models_without_pretrained_weights_name_those_with(name, model):
    message = f"no pretrained weights for '{name}'; it has: resnet18, resnet34, .*, vgg19_bn$"
    with pytest.raises(ValueError, match=message):
        load_pretrained(name, model)
