"""Names of models: which source they are of, what wildcards stand for, and what is refused."""

import importlib.util
from pathlib import Path

import pytest

from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.model_name import parse
from resfuse.bench.models.sources import choose, choose_one, matching


def test_a_name_says_source_and_arguments() -> None:
    given = parse("smp:Unet?encoder_name=resnet34&classes=2", more=["classes=3", "wide=(1, 2)"])
    assert given.text == "smp:Unet"
    assert given.arguments() == {"encoder_name": "resnet34", "classes": 3, "wide": (1, 2)}
    assert parse(str(given)) == given  # the row's name builds the same model
    assert parse("resnet?8").text == "resnet?8"  # a wildcard


def test_wildcards_are_of_one_source() -> None:
    assert choose("-m", ["timm:resnet10*t"]) == ["timm:resnet10t"]
    assert choose("-m", ["torchvision:mobilenet_v3*"]) == [
        "torchvision:mobilenet_v3_large",
        "torchvision:mobilenet_v3_small",
    ]
    assert set(choose("-m", ["torchvision:resnet18", "resnet18"])) == {
        "torchvision:resnet18", "resnet18"
    }  # fmt: skip
    assert choose("-m", ["resnet34", "resnet18"]) == ["resnet18", "resnet34"]  # as ever
    tagged = choose("-m", ["timm:resnet18.a*"])
    assert "timm:resnet18.a1_in1k" in tagged
    assert all(name.startswith("timm:resnet18.a") for name in tagged)
    assert choose("-m", ["resnet18"], ["num_classes=7"]) == ["resnet18?num_classes=7"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timn:resnet18", r"unknown source 'timn'; did you mean timm:\? accepted: a name of"),
        ("timm:resnet81", r"unknown name 'resnet81'; did you mean resnet\d+"),
        ("torchvision:resnet81", "resfuse list models --source torchvision` shows the"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown name 'fasterrcnn_resnet50_fpn'"),
        ("smp:Unett", r"unknown name 'Unett'; did you mean Unet"),
        ("resnet81", "unknown name 'resnet81'; did you mean resnet18"),
        ("net.py", r"net.py names no function; accepted: net.py:NAME"),
        ("no_such_package.models:net", "unknown source 'no_such_package.models'"),
        ("resnet18?num_classes=", "'num_classes=' is not NAME=VALUE"),
    ],
)
def test_what_is_unknown_is_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose("--model", [name])


def test_arguments_are_names_and_values() -> None:
    for bad in ("classes", "=3", "two words=3"):
        with pytest.raises(UsageError, match=r"argument --model-kwargs: '.*' is not NAME=VALUE"):
            choose("--model", ["resnet18"], [bad])


def test_one_model_is_not_several() -> None:
    with pytest.raises(UsageError, match="stands for 2 names; give one"):
        choose_one("MODEL", "torchvision:mobilenet_v3*")


@pytest.mark.parametrize("source", ["torchvision", "timm", "smp"])
def test_a_package_that_is_not_installed(
    source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = {"smp": "segmentation_models_pytorch"}
    package = packages.get(source, source)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    assert main(["bench", "-m", f"{source}:Unet"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"resfuse: error: argument --model: {source}: needs the package {package}, which is not "
        "installed\n"
    )


def test_sources_list_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models", "--source", "timm", "resnet10*"]) == 0
    said = capsys.readouterr().out
    assert ["timm:resnet10t", "3x176x176"] in [line.split() for line in said.splitlines()]
    assert "resnet18" not in said
    assert "smp:Unet" in matching("smp", ["Unet"])
    file = tmp_path / "nets.py"
    file.write_text("raise SystemExit\ndef small(): ...\ndef _hidden(): ...\n")
    assert matching(str(file), ["*"]) == [f"{file}:small"]  # and nothing was run
    assert main(["list", "models", "--source", "tim"]) == 2
    assert "unknown source 'tim'; did you mean timm? accepted: resfuse, " in capsys.readouterr().err
    assert main(["list", "backends", "resnet18"]) == 2
