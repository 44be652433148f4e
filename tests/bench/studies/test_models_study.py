"""`resfuse study models`: what a row says of a network that is right, wrong, refused or deadly."""

import copy
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.cli import main
from resfuse.bench.records import results
from resfuse.bench.records.sample import Value
from resfuse.bench.report.study_pages import MODELS
from resfuse.bench.studies.models import compare_answers, models_study, models_table, networks

pytestmark = pytest.mark.slow


def deadly(network: str, img_size: int, kinds: Sequence[str]) -> dict[str, Value]:
    """Stands for `compare` in a process of its own."""
    if network == "dies":
        os.abort()
    if network == "hangs":
        time.sleep(600)
    while network == "spins":
        pass
    if network == "raises":
        raise RuntimeError("eager refuses")
    return {"network": network, "img_size": img_size, "fuse_status": "pass"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_network_that_dies_or_hangs_costs_its_own_row(
    monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(models_study, "compare", deadly)
    asked = ["lives", "dies", "lives", "raises", "hangs", "spins", "lives"]
    found = list(models_study.rows(asked, 32, 3.0, jobs=jobs))
    statuses = sorted((str(row["network"]), str(row["fuse_status"])) for row in found)
    lives = [("lives", "pass")] * 3
    ends = [("dies", "crash"), ("hangs", "timeout"), ("spins", "timeout")]
    ends += [("raises", "no_reference")]
    assert statuses == sorted(lives + ends)


def waits(network: str, img_size: int, kinds: Sequence[str]) -> dict[str, Value]:
    """Stands for `compare` beside many other processes: little of its time is the CPU's."""
    for _ in range(8):
        time.sleep(0.5)
        sum(range(2_000_000))
    return {"network": network, "fuse_status": "pass"}


def test_other_processes_do_not_use_up_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_study, "compare", waits)
    assert [row["fuse_status"] for row in models_study.rows(["slow"], 32, 3.0)] == ["pass"]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


class FoldsWrongly(nn.Module):
    """Stands for a fused model that is off by a percent."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 1.01


def test_a_right_network_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "create", lambda name: network())
    row = compare_answers.compare("timm tiny", 32)
    assert (row["fuse_status"], row["engine_status"]) == ("pass", "pass"), row
    assert row["macs_fused_pct"] == pytest.approx(100, abs=2)
    assert row["convolutions"] == 1


def test_a_wrong_answer_a_refusal_and_other_strides_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "create", lambda name: network())
    monkeypatch.setattr(compare_answers, "fuse", FoldsWrongly)
    monkeypatch.setattr(compare_answers, "explain", lambda *_: type("Told", (), {"share": None}))

    def refuses(*_: object) -> None:
        raise ValueError("argument model: not this one")

    monkeypatch.setattr(compare_answers, "build_engine", refuses)
    row = compare_answers.compare("timm tiny", 32)
    assert row["fuse_status"] == "wrong"
    assert row["fuse_rel_l2"] == pytest.approx(0.01, rel=0.01)
    assert row["engine_status"] == "refused"
    assert row["engine_error"] == "argument model: not this one"

    class OtherStrides(FoldsWrongly):
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).t().contiguous().t()

    monkeypatch.setattr(compare_answers, "fuse", OtherStrides)
    row = compare_answers.compare("timm tiny", 32)
    assert (row["fuse_status"], row["fuse_error"]) == ("wrong", "strides (1, 2) for eager's (5, 1)")


def test_an_error_of_ours_is_no_refusal() -> None:
    def broken() -> float:
        raise KeyError("weight")

    assert compare_answers.judged("fuse", broken, 1.0) == {
        "fuse_status": "error", "fuse_error": "KeyError: 'weight'",
    }  # fmt: skip
    assert compare_answers.judged("fuse", lambda: float("nan"), 1.0)["fuse_status"] == "wrong"


def test_every_name_exists() -> None:
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    known = {f"timm {name}" for name in timm.list_models()}
    known |= {f"torchvision {name}" for name in torchvision.models.list_models()}
    assert len(networks.NETWORKS) == len(set(networks.NETWORKS)) >= 150
    assert set(networks.NETWORKS) <= known


def test_the_command_appends_rows_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["study", "models", "-m", "torchvision squeezenet1_1", "--results", str(tmp_path)]
    assert main(asked) == 0
    assert "fuse: 1 pass\nengine: 1 pass" in capsys.readouterr().out
    assert main([*asked, "--resume"]) == 0
    [page] = tmp_path.glob("*/MODELS.md")
    assert "- fuse: 1 pass\n- engine: 1 pass\n" in page.read_text()
    [file] = tmp_path.glob("*/models.csv")
    assert list(pd.read_csv(file).network) == ["torchvision squeezenet1_1"]
    assert main(["study", "models", "-m", "nosuch", "--results", str(tmp_path)]) == 2
    assert "--model: unknown name 'nosuch'" in capsys.readouterr().err


def test_calibrated_statistics_are_those_of_the_images() -> None:
    torch.manual_seed(0)
    model = network()
    images = torch.randn(8, 3, 16, 16)
    compare_answers.calibrate(model, images)
    conv, norm = model[0], model[1]
    assert isinstance(norm, nn.BatchNorm2d) and not norm.training
    torch.testing.assert_close(norm.running_mean, conv(images).mean((0, 2, 3)).detach())


def test_kinds_asked_one_at_a_time_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(
        wanted: Sequence[str], size: int, timeout: float, kinds: Sequence[str], jobs: int
    ) -> Iterator[dict[str, Value]]:
        for name in wanted:
            yield {"network": name, **{f"{kind}_status": "pass" for kind in kinds}}

    monkeypatch.setattr(models_study, "rows", answers)
    asked = ["study", "models", "-m", "torchvision resnet18", "--results", str(tmp_path)]
    assert main([*asked, "--kinds", "fuse"]) == 0
    assert "engine" not in capsys.readouterr().out
    assert main([*asked, "--kinds", "engine", "--resume"]) == 0
    assert main([*asked, "--resume"]) == 0
    [file] = tmp_path.glob("*/models.csv")
    assert len(pd.read_csv(file)) == 2
    assert "- fuse: 1 pass\n- engine: 1 pass\n" in (file.parent / MODELS).read_text()


def sheet(*given: dict[str, Value]) -> pd.DataFrame:
    """Rows as results.read_rows gives them."""
    known = models_study.SHEET
    empty = {name: "" if name in known.text else float("nan") for name in known.columns}
    return pd.DataFrame([{**empty, **row} for row in given])


def test_the_table_has_the_newest_commit_and_adds_up_the_kinds() -> None:
    new = {"env_id": "e", "commit": "new", "eager_rel_l2": 2e-6, "img_size": 64}
    rows = sheet(
        {"network": "timm gone", "fuse_status": "wrong", "env_id": "e", "commit": "old"},
        {"network": "timm b", "fuse_status": "crash", "fuse_error": "died", **new},
        {"network": "timm b", "fuse_status": "pass", "fuse_rel_l2": 1e-6, "macs_fused_pct": 87.6,
         "convolutions": 20, **new},
        {"network": "timm b", "engine_status": "refused", "engine_error": "no | <b>", **new},
        {"network": "timm a", "fuse_status": "wrong", "fuse_rel_l2": 1e-5, **new},
    )  # fmt: skip
    page = models_table.page(rows, models_study.KINDS)
    assert "gone" not in page and "commit new." in page
    assert "- fuse: 1 wrong, 1 pass\n- engine: 1 not compared, 1 refused\n" in page
    _, families, failures, every = page.split("\n## ")
    assert cells(every)[2:] == [
        ["timm a", "64", "", "", "2.0e-06", "wrong", "not compared"],
        ["timm b", "64", "20", "88 %", "2.0e-06", "0.50", "refused"],
    ]
    assert cells(families)[2:] == [
        ["others", "2", "88 %", "1 wrong, 1 pass", "1 not compared, 1 refused", "0.50"]
    ]
    assert failures.splitlines()[2:4] == [
        "- timm a, fuse: wrong: 5.00 times eager's error",
        r"- timm b, engine: refused: no \| &lt;b&gt;",
    ]


def cells(text: str) -> list[list[str]]:
    """Of the one table in a text."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_a_family_has_a_line_of_all_its_networks() -> None:
    here = {"env_id": "e", "commit": "c", "eager_rel_l2": 1e-6}
    rows = sheet(
        {"network": "timm dla34", "fuse_status": "pass", "fuse_rel_l2": 1.5e-6,
         "engine_status": "timeout", "engine_error": "not done", "macs_fused_pct": 90.0, **here},
        {"network": "timm dla60x", "fuse_status": "timeout", "fuse_error": "not done",
         "engine_status": "timeout", "engine_error": "not done", **here},
        {"network": "timm dla46_c", "fuse_status": "pass", "fuse_rel_l2": 1e-6,
         "engine_status": "pass", "engine_rel_l2": 0.5e-6, "macs_fused_pct": 100.0, **here},
        {"network": "timm repvgg_a0", "fuse_status": "pass", "fuse_rel_l2": 1e-6,
         "engine_status": "pass", "engine_rel_l2": 0.7e-6, "macs_fused_pct": 100.0, **here},
    )  # fmt: skip
    _, families, failures, _ = models_table.page(rows, models_study.KINDS).split("\n## ")
    assert cells(families)[2:] == [
        ["RepVGG", "1", "100 %", "1 pass", "1 pass", "1.00"],
        ["DLA", "3", "90 to 100 %", "2 pass, 1 took too long", "2 took too long, 1 pass", "1.50"],
    ]
    assert "- timm dla60x, fuse and engine: took too long: not done\n" in failures


def test_what_ran_out_of_time_is_tried_again(tmp_path: Path) -> None:
    where = {"env_id": "e", "commit": "c"}
    for name, status in (("slow", "timeout"), ("dead", "crash"), ("no", "refused")):
        row = {"network": name, "fuse_status": status, "engine_status": status, **where}
        results.append_row(tmp_path, row, models_study.SHEET)
    assert models_study.settled(tmp_path, where, models_study.KINDS) == {"no"}
    late = {"network": "slow", "fuse_status": "pass", "engine_status": "pass", **where}
    results.append_row(tmp_path, late, models_study.SHEET)
    assert models_study.settled(tmp_path, where, models_study.KINDS) == {"no", "slow"}


def test_a_deep_network_is_calibrated_on_the_images_it_is_asked() -> None:
    """Statistics of other images made its activations grow from block to block."""
    row = compare_answers.compare("torchvision efficientnet_v2_s", 64, kinds=())
    assert float(str(row["eager_rel_l2"])) < 1e-4


def test_a_channel_that_was_dead_is_not_multiplied_by_hundreds() -> None:
    norm = nn.BatchNorm2d(2)
    images = torch.randn(8, 2, 4, 4) * torch.tensor([1.0, 1e-6]).view(1, 2, 1, 1)
    compare_answers.calibrate(nn.Sequential(norm), images)
    assert norm.running_var is not None
    alive, dead = norm.running_var.tolist()
    assert alive == pytest.approx(1, rel=0.3)
    assert dead == pytest.approx(0.1 * alive / 2, rel=1e-3)


def test_a_network_that_amplifies_rounding_is_no_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chaos(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e9 * x.mean((2, 3)))

    monkeypatch.setattr(networks, "create", lambda name: Chaos())
    with pytest.raises(ArithmeticError, match=r"off by .* from fp64"):
        compare_answers.compare("timm chaos", 32)


def test_nothing_hides_a_branch() -> None:
    """A residual branch behind a scale of 0 or 1e-6 could compute anything."""
    model = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)])
    zero, one, conv = model
    assert isinstance(zero, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
    nn.init.zeros_(zero.weight)
    before = conv.weight.clone()
    compare_answers.spread(model)
    for parameter in (zero.weight, zero.bias, one.weight):
        assert isinstance(parameter, Tensor)
        assert len(parameter.unique()) == 4 and float(parameter.detach().abs().max()) > 0.05
    assert torch.equal(conv.weight, before)  # drawn at random already


def test_the_yardstick_is_eagers_worse_memory_format() -> None:
    model = nn.Conv2d(3, 4, 1)
    twin, off = copy.deepcopy(model).double(), copy.deepcopy(model)
    with torch.no_grad():
        off.weight *= 1.01
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        right = compare_answers.own_error(model, model, twin, x)
        assert right < 1e-6 < 1e-3 < compare_answers.own_error(model, off, twin, x)
        assert compare_answers.own_error(off, model, twin, x) > 1e-3
