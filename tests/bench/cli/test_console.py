"""What a command prints is what it was told, brackets and all."""

import re
from pathlib import Path

import pytest
from rich.table import Table

from conftest import ROOT
from resfuse.bench.common import console
from resfuse.bench.layers import layer_sweep
from resfuse.bench.layers.kernels_command import run_convolutions
from resfuse.bench.records import results
from resfuse.bench.records.case import Options
from resfuse.bench.records.convolutions import Convolution
from resfuse.bench.records.outcome import Outcome
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of

FOREIGN = "expected [bold] int[4]; got [/N, C] in [red]"
_OF_RICH = re.compile(r"(?<!\w)Console\(")


def test_lines_and_cells_keep_their_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("what was [said]")
    table.add_row(FOREIGN)
    for to in (console.stdout(), console.stderr()):
        to.print(FOREIGN)
        to.print(table)
    for printed in capsys.readouterr():
        assert printed.count(FOREIGN) == 2 and "what was [said]" in printed


def test_a_providers_error_is_printed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = {"eager": Outcome("fail_to_run", FOREIGN)}
    monkeypatch.setattr(layer_sweep, "run_convolution", lambda *_: outcomes)
    problem = ConvProblem(
        1, 3, 8, 8, k=4, r=3, s=3, geometry=Geometry(padding=(1, 1)), dtypes=dtypes_of("ieee")
    )
    convolution = Convolution("tiny", 8, "cpu", "float32", "0", 1, problem)
    facts = {"device_name": "some CPU"}
    found = {"facts": facts, "env_id": "0123456789", "commit": "1e5"}
    results.record_environment(tmp_path, "0123456789", facts)
    run_convolutions([convolution], ["eager"], Options(), tmp_path, found, console.stderr())
    assert f"eager fail_to_run: {FOREIGN}" in capsys.readouterr().err


def test_every_command_prints_on_these_consoles() -> None:
    own = [path for path in (ROOT / "bench").rglob("*.py") if _OF_RICH.search(path.read_text())]
    assert [path.name for path in own] == ["console.py"]
