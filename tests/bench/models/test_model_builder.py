"""A model from its description: the same in every process, with the weights that were asked for."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.model_builder import build, describe, input_shape
from resfuse.bench.models.weights_file import state_hash

SMALL = "timm:resnet10t"


def test_a_name_and_a_seed_are_the_whole_description() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    here = state_hash(build(SMALL, seed=3))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is its own
    code = (
        "from resfuse.bench.models.model_builder import build\n"
        "from resfuse.bench.models.weights_file import state_hash\n"
        f"print(state_hash(build('{SMALL}', seed=3)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert state_hash(build(SMALL, seed=4)) != here


def test_the_hash_is_of_names_dtypes_shapes_and_bytes() -> None:
    def of(**tensors: torch.Tensor) -> str:
        holder = nn.Module()
        for name, tensor in tensors.items():
            holder.register_buffer(name, tensor)
        return state_hash(holder)

    x = torch.arange(6.0)
    assert of(a=x) == of(a=x.clone())
    hashes = {of(a=x), of(b=x), of(a=x.view(2, 3)), of(a=x.view(torch.int32)), of(a=x + 1)}
    assert len(hashes) == 5
    assert of(a=x, b=x.bool()) == of(b=x.bool(), a=x)  # in no order
    assert of(a=torch.tensor(3)) != of(a=torch.tensor(4))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("resnet18", (3, 224, 224)),
        ("cifar_resnet20", (3, 32, 32)),
        ("timm:resnet10t", (3, 176, 176)),
        ("timm:resnet10t?in_chans=12", (12, 176, 176)),
        ("torchvision:inception_v3", (3, 299, 299)),
        ("torchvision:deeplabv3_resnet50", (3, 520, 520)),
        ("smp:Unet?in_channels=1", (1, 224, 224)),
    ],
)
def test_each_source_says_what_images_it_takes(model: str, shape: tuple[int, ...]) -> None:
    assert input_shape(model) == shape
    assert input_shape(model, img_size=96) == (shape[0], 96, 96)
    assert input_shape(model, (shape[0], 8, 9)) == (shape[0], 8, 9)
    with pytest.raises(UsageError, match=f"takes {shape[0]} channels, not 2; --model-kwargs may"):
        input_shape(model, (2, 8, 9))


def test_a_description_names_the_version_or_the_file(tmp_path: Path) -> None:
    import timm

    assert describe(SMALL).origin == f"timm {timm.__version__}"
    weights = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    first = describe(SMALL, str(weights)).origin
    save_file({"a": torch.ones(1)}, weights)
    assert first.startswith(f"timm {timm.__version__} + w.safetensors sha256:")
    assert describe(SMALL, str(weights)).origin != first


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "timm:resnet10t?depth=3",
            r"argument --model-kwargs: timm:resnet10t\?depth=3: TypeErr",
        ),
        ("smp:Unet?encoder_name=resnet35", r"argument --model-kwargs: smp:Unet\?encoder_name"),
        ("torchvision:resnet18?num_classes=many", "argument --model-kwargs: torchvision:resnet18"),
        ("resnet18?width=3", r"argument --model-kwargs: resnet18\?width=3: TypeError"),
    ],
)
def test_arguments_that_a_model_does_not_take(model: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        build(model)
    assert "\n" not in str(refused.value)


class Exploding:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return eval, ("open('exploded', 'w')",)


def test_a_pickle_is_no_weights_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("whole.pth").write_bytes(pickle.dumps({"state_dict": Exploding()}))
    torch.save({"state_dict": Exploding()}, "saved.pth")
    for file in ("whole.pth", "saved.pth"):
        with pytest.raises(UsageError, match=f"argument --weights: {SMALL}: weights file {file}"):
            build(SMALL, weights=file)
    assert not Path("exploded").exists()


def test_weights_that_do_not_fit_name_the_first_key(tmp_path: Path) -> None:
    model = build(SMALL)
    state = model.state_dict()
    whole, lacking, adding = (str(tmp_path / f"{n}.safetensors") for n in ("w", "l", "a"))
    save_file({key: 2 * value for key, value in state.items()}, whole)
    save_file({key: value for key, value in state.items() if key != "fc.bias"}, lacking)
    save_file({**state, "extra": torch.zeros(1)}, adding)
    filled = build(SMALL, weights=whole)
    assert torch.equal(filled.get_parameter("fc.bias"), 2 * model.get_parameter("fc.bias"))
    with pytest.raises(UsageError, match=r"argument --weights: timm:resnet10t: .*lacks fc.bias"):
        build(SMALL, weights=lacking)
    with pytest.raises(UsageError, match=r"argument --weights: timm:resnet10t: .*adds extra"):
        build(SMALL, weights=adding)


def test_timms_vgg_keeps_its_own_names(tmp_path: Path) -> None:
    """The names that our own VGG is filled under are another network's here."""
    file = tmp_path / "vgg.safetensors"
    model = build("timm:vgg11?num_classes=4&global_pool=avg")
    save_file(model.state_dict(), file)
    assert state_hash(build("timm:vgg11?num_classes=4&global_pool=avg", 1, str(file))) == (
        state_hash(model)
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("torchvision:resnet18", "are not on this disk .*resnet18-f37072fd.pth.*nothing is downl"),
        ("resnet18", "are not on this disk .*resnet18-f37072fd.pth.*nothing is downloaded"),
        ("plain34", "torchvision has no pretrained weights for 'plain34'"),
        ("timm:resnet18.a1_in1k", "timm/resnet18.a1_in1k is not on this disk, and nothing is down"),
        ("smp:Unet?encoder_name=resnet34", "smp-hub/resnet34.imagenet is not on this disk"),
    ],
)
def test_pretrained_weights_are_never_fetched(
    model: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_caches(tmp_path, monkeypatch)
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("it asked the network"))
    with pytest.raises(UsageError, match=said) as refused:
        build(model, weights="pretrained")
    assert str(refused.value).startswith(f"argument --pretrained: {model}: ")


def test_pretrained_weights_come_from_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_caches(tmp_path, monkeypatch)
    checkpoints = tmp_path / "torch/hub/checkpoints"
    checkpoints.mkdir(parents=True)
    published = build("torchvision:resnet18", seed=8)
    torch.save(published.state_dict(), checkpoints / "resnet18-f37072fd.pth")
    for name in ("torchvision:resnet18", "resnet18"):
        assert state_hash(build(name, weights="pretrained")) == state_hash(published)

    repository = tmp_path / "hub/models--timm--resnet10t.c3_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    published = build(SMALL, seed=8)
    save_file(published.state_dict(), snapshot / "model.safetensors")
    assert state_hash(build(SMALL, weights="pretrained")) == state_hash(published)
    # timm folds three channels into one, as its own users get it.
    grey = build(f"{SMALL}?in_chans=1", weights="pretrained")
    assert grey.get_parameter("conv1.0.weight").shape[1] == 1


def empty_caches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
