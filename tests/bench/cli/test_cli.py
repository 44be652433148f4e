"""The command line: bad input gets one sentence and exit code 2, before anything is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from resfuse.bench.cli import COMMANDS, main
from resfuse.bench.common.subcommand import Subcommand
from resfuse.bench.running import survey
from resfuse.bench.running.profiles import PROFILES
from resfuse.bench.studies import STUDIES

pytestmark = pytest.mark.slow


@pytest.fixture
def surveyed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey is taken in this process: one of its own takes seconds."""

    def run_task(task: str, payload: dict[str, Any], limit_s: float) -> dict[str, Any]:
        return survey.take_survey(payload, None)

    monkeypatch.setattr(survey, "run_task", run_task)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of bad input: one line on stderr, exit code 2."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("resfuse: error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "resnet81"], "--model: unknown name 'resnet81'; did you mean resnet18"),
        (["-m", "dense*"], "--model: unknown name 'dense*'; `resfuse list models` shows the "),
        (["--backend", "eager,onnx"], "--backend: unknown name 'onnx'; did you mean onnxrt"),
        (["--precision", "fp8"], "--precision: unknown name 'fp8'; "),
        (["--precision", "fp8"], "known: float32, tf32, float16, bfloat16, bf16, int8"),
        (
            ["--precision", "float32,fp16"],
            "--precision: fp16, an fp32 network computed in fp16, is ",
        ),
        (["--precision", "fp16"], "is not measured yet; float16 is a network given in fp16"),
        (["--memory-format", "nhwc"], "known: contiguous, channels_last"),
        (["--bench", "inference,fit"], "--bench: unknown name 'fit'; "),
        (["--baseline", "numpy"], "--baseline: unknown name 'numpy'; "),
        (["-b", "0"], "--batch-size: 0; accepted: whole numbers from 1"),
        (["-b", "8,-1"], "--batch-size: -1; accepted: whole numbers from 1"),
        (["-b", "many"], "--batch-size: 'many' is not a whole number"),
        (["--img-size", "0"], "--img-size: 0; accepted: whole numbers from 1"),
        (["--seconds", "0"], "--seconds: '0'; accepted: numbers above 0"),
        (["--seconds", "nan"], "--seconds: 'nan'; accepted: numbers above 0"),
        (["--threads", "-2"], "--threads: -2; accepted: whole numbers from 0"),
        (["--profile", "huge"], "--profile: invalid choice: 'huge'"),
        (["--weights", "a", "--pretrained"], "not allowed with argument"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(["bench", "--results", str(tmp_path / "r"), *arguments], capsys)
    assert not (tmp_path / "r").exists()  # found before anything was made


def test_bad_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "invalid choice: 'benhc'" in error_of(["benhc"], capsys)
    assert "required: COMMAND" in error_of([], capsys)
    assert "invalid choice: 'dpeth'" in error_of(["study", "dpeth"], capsys)
    assert "invalid choice: 'kernel'" in error_of(["list", "kernel"], capsys)
    assert "no rows.csv in" in error_of(["report", "--results", str(tmp_path)], capsys)


def test_an_unwritable_results_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "results")
    assert "cannot be written" in error_of(["bench", "--results", folder], capsys)


@pytest.mark.usefixtures("surveyed_here")
def test_devices_that_are_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = ["bench", "-m", "resnet18", "--results", str(tmp_path), "--device"]
    assert "--device: 'gpu' cannot be used" in error_of([*bench, "gpu"], capsys)
    if not torch.cuda.is_available():
        assert "accepted here: cpu" in error_of([*bench, "cuda"], capsys)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("missing.safetensors", "missing.safetensors"),
        ("corrupt.safetensors", "corrupt.safetensors"),
        ("corrupt.pth", "corrupt.pth"),
        ("other.safetensors", "lacks conv1.weight"),
    ],
)
def test_bad_weights(
    weights: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Missing, corrupt, and with the keys of another network; one of them is found as a user's
    are, by the survey's own process.
    """
    if weights != "missing.safetensors":
        request.getfixturevalue("surveyed_here")
    (tmp_path / "corrupt.safetensors").write_bytes(b"\x00" * 40)
    (tmp_path / "corrupt.pth").write_bytes(b"not a checkpoint")
    save_file({"stem": torch.zeros(1)}, tmp_path / "other.safetensors")
    bench = ["bench", "-m", "resnet18", "--device", "cpu", "--results", str(tmp_path / "r")]
    error = error_of([*bench, "--weights", str(tmp_path / weights)], capsys)
    assert "--weights: resnet18: " in error
    assert said in error


@pytest.mark.usefixtures("surveyed_here")
def test_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = ["bench", "-m", "resnet18", "--device", "cpu", "--results", str(tmp_path / "r")]
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    assert "is not a folder" in error_of([*bench, "--images", str(missing)], capsys)
    empty.mkdir()
    assert "holds no image" in error_of([*bench, "--images", str(empty)], capsys)
    (empty / "cat.jpg").write_bytes(b"\xff\xd8\xff no more")
    assert "cat.jpg cannot be read" in error_of([*bench, "--images", str(empty)], capsys)


@pytest.mark.usefixtures("surveyed_here")
def test_pretrained_without_a_network_or_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = ["bench", "-m", "plain34", "--device", "cpu", "--results", str(tmp_path)]
    error = error_of([*bench, "--pretrained"], capsys)
    assert "--pretrained: plain34: " in error


@pytest.mark.usefixtures("surveyed_here")
def test_dry_run_shows_every_case_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    arguments = ["-m", "resnet18,cifar_resnet20", "-b", "1,4", "--backend", "eager,onnxrt"]
    done = main(["bench", "--dry-run", "--device", "cpu", "--results", str(folder), *arguments])
    said = capsys.readouterr().out
    assert done == 0
    # Two models, two batches; eager in two memory formats, onnxrt in the one it takes.
    assert "12 cases" in said
    assert said.count("onnxrt") == 4
    assert [line.split()[3] for line in said.splitlines() if "cifar" in line] == ["32"] * 6
    assert not folder.exists()


@pytest.mark.parametrize(
    "what", ["models", "backends", "kernels", "providers", "metrics", "profiles"]
)
def test_list_shows_the_registries(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    from resfuse.bench.backends import BACKENDS
    from resfuse.bench.backends.providers import PROVIDERS
    from resfuse.bench.records.metrics import METRICS
    from resfuse.kernels.gpu.registry import KERNELS
    from resfuse.resnet_ref import MODELS

    registries = {
        "models": MODELS, "backends": BACKENDS, "metrics": METRICS, "kernels": KERNELS,
        "providers": PROVIDERS,
        "profiles": {name for name, _ in PROFILES},
    }  # fmt: skip
    assert main(["list", what]) == 0
    said = capsys.readouterr().out
    first_words = {line.split()[0] for line in said.splitlines() if line.strip()}
    assert set(registries[what]) <= first_words


@pytest.mark.parametrize("table", [COMMANDS, STUDIES], ids=["COMMANDS", "STUDIES"])
def test_what_runs_a_command_is_where_its_table_says(table: dict[str, Subcommand]) -> None:
    for name, command in table.items():
        assert callable(command.load()), name


def test_help_and_the_import_behind_it_load_nothing_heavy() -> None:
    """`resfuse --help` in less than a second means: no torch, no pandas, no matplotlib."""
    code = (
        "import sys, json, resfuse.bench.cli as cli\n"
        "loaded = [name for name in sys.modules if '.' not in name]\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"torch", "pandas", "matplotlib", "rich", "onnxruntime", "sklearn"}


def test_a_reader_that_has_gone_is_no_error() -> None:
    """`resfuse study models --list | head -1`: no traceback, not even from the flush at exit."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from resfuse.bench.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "study", "models", "--list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_reads_rows_needs_no_torch() -> None:
    """It takes 1.6 CPU seconds to import, and a report of many rows less than two."""
    code = (
        "import sys, resfuse.bench.report, resfuse.bench.compare.compare_command\n"
        "from resfuse.bench.cli import main\n"
        "assert main(['list', 'backends']) == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "openvino" in done.stdout
