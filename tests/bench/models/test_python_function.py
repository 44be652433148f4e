"""Models of a Python file or module, and what is wrong with some."""

import subprocess
import sys
from pathlib import Path

import pytest

from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.model_builder import build, describe, input_shape
from resfuse.bench.models.sources import choose

NETS = """
import torch
from torch import nn
from beside import WIDTH


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def net(width=WIDTH):
    return Net(width)


def told():
    model = Net(4)
    model.pretrained_cfg = {"input_size": (3, 48, 40)}
    return model


def lightning():
    model = Net(4)
    model.example_input_array = torch.zeros(1, 3, 30, 31)
    return model


def raises():
    raise KeyError("no such thing")


def number():
    return 3


def leaves():
    raise SystemExit(4)


constant = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("beside.py").write_text("WIDTH = 5\n")
    Path("broken.py").write_text("def net():\n    pass\nassert 1 == 2, 'not today'\n")
    Path("syntax.py").write_text("def net(:\n")
    return "./nets.py"


def test_a_function_of_a_file_is_called_with_its_arguments(nets: str) -> None:
    (name,) = choose("-m", [f"{nets}:net"], ["width=7"])
    assert name == "./nets.py:net?width=7"
    assert build(name).get_parameter("layers.0.weight").shape[0] == 7
    assert build(f"{nets}:net").get_parameter("layers.0.weight").shape[0] == 5
    assert describe(name, asked=(3, 8, 8)).weights == "own"


def test_a_function_of_a_module_in_a_process_of_its_own(nets: str) -> None:
    code = (
        "from resfuse.bench.models.model_builder import build\nprint(len(build('nets:net').layers))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_the_origin_follows_the_file(nets: str) -> None:
    before = describe(f"{nets}:net", asked=(3, 8, 8)).origin
    assert before.startswith("nets.py sha256:")
    Path("nets.py").write_text(NETS + "\n# changed\n")
    assert describe(f"{nets}:net", asked=(3, 8, 8)).origin != before


def test_a_model_may_say_what_images_it_takes(nets: str) -> None:
    assert input_shape(f"{nets}:told") == (3, 48, 40)
    assert input_shape(f"{nets}:lightning") == (3, 30, 31)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./nets.py:net", "argument --input-shape: nothing says what images ./nets.py:net takes"),
        ("./nets.py:net?width=x", r"./nets.py:net of {'width': 'x'} raised TypeError"),
        ("./nets.py:raises", "./nets.py:raises raised KeyError: 'no such thing'"),
        ("./nets.py:number", "./nets.py:number returned a int, no torch.nn.Module"),
        ("./nets.py:leaves", "./nets.py:leaves ended the process (SystemExit: 4)"),
        ("./nets.py:nett", "./nets.py:nett is not there; did you mean ./nets.py:net or"),
        ("./nets.py:constant", "./nets.py:constant is no function"),
        ("./broken.py:net", "./broken.py raised AssertionError: not today while it was imported"),
        ("./syntax.py:net", "./syntax.py raised SyntaxError"),
        ("./missing.py:net", "there is no file ./missing.py"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    model: str, said: str, nets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "-m", model, "--results", "r"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfuse: error: argument --")
    assert said in error
    assert error.count("\n") == 1
    assert not Path("r").exists()


def test_it_has_no_pretrained_weights(nets: str) -> None:
    with pytest.raises(UsageError, match=r"argument --pretrained: ./nets.py:net: no pretrained"):
        build(f"{nets}:net", weights="pretrained")
