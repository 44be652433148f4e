"""What readers see: results that still make their report, a README that quotes them."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from report_rows import tables
from resfuse.bench.records import results
from resfuse.bench.report import write_report
from resfuse.bench.report.short_report import LONGEST

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob(f"*/{results.ROWS}"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_report_is_made_from_the_rows_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regenerated from the CSV files alone, the page is the same to the byte; it shows the pages of
    studies that lie beside it. Its plots are made and not rendered: four fifths of the seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **how: Path(path).touch())
    studies = ("CONTENTION.md", "contention.png", "MODELS.md", "models.png")
    for file in [*folder.glob("*.csv"), *map(folder.joinpath, studies)]:
        if file.exists():
            shutil.copy(file, tmp_path / file.name)
    again = write_report(tmp_path)
    assert again.read_text() == (folder / "REPORT.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_passed_rows_are_complete_and_failed_ones_have_no_speed(folder: Path) -> None:
    rows = results.read_rows(folder)
    passed = rows[rows.status == "pass"]
    for column in ("p50_ms", "rel_l2_err", "speedup_ci_low", "speedup_ci_high", "param_count"):
        assert passed[column].notna().all()
    assert (passed.speedup_ci_low <= passed.speedup).all()
    assert (passed.speedup <= passed.speedup_ci_high).all()
    assert rows[rows.status != "pass"].p50_ms.isna().all()
    assert set(rows.env_id) <= set(results.read_environments(folder))


def committed(*command: str) -> str:
    """What git says of the last commit: `make bench` on a machine like ours changes the folder."""
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return done.stdout


def test_the_readme_quotes_the_report() -> None:
    """Each cell of its table, and each ratio below it, stands in the report that it links to."""
    link = re.search(r"\]\((results/[^)]*)/REPORT\.md\)", README)
    assert link
    page = committed("show", f"HEAD:{link[1]}/REPORT.md")
    report = {
        (line["batch"], line["backend"]): line
        for title, lines in tables(page)
        if title == "resnet50, 224 px"
        for line in lines
    }
    (quoted,) = [rows for title, rows in tables(README) if title == "What it gains"]
    assert len(quoted) == 6
    for row in quoted:
        own = report["1", row["backend"]]
        assert row["times faster than eager"] == own["faster than eager"]
        assert [row[k] for k in ("ms", "peak, MB", "error")] == [
            own[k] for k in ("ms", "peak, MB", "error")
        ]
    told = " ".join(README.split())
    for batch, baseline, name in (
        ("1", "openvino", "faster than OpenVINO"), ("1", "onnxrt", "than ONNX Runtime"),
        ("1", "compiled", "than torch.compile"), ("8", "openvino", "faster than OpenVINO"),
        ("8", "onnxrt", "than ONNX Runtime"),
    ):  # fmt: skip
        ratio = report[batch, "engine channels_last"][f"than {baseline}"].split()[0]
        assert re.search(rf"{ratio} (times )?{name}", told), (batch, baseline, ratio)


def test_a_reader_finds_the_readme_short() -> None:
    """A minute: no paragraph of more than four lines, none wider than a screen."""
    prose = re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.S)
    paragraphs = [p for p in prose.split("\n\n") if not p.lstrip().startswith(("|", "-", "#", "!"))]
    assert max(len(p.strip().splitlines()) for p in paragraphs) <= 4
    assert all(len(line) <= 122 for p in paragraphs for line in p.splitlines())
    assert len(README.splitlines()) <= 125
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_a_machine_has_four_pictures_at_most_and_a_page_of_150_lines() -> None:
    """Other plots are made by `resfuse report`; older rows are in results/archive."""
    files = committed("ls-tree", "-r", "--name-only", "HEAD", "results").splitlines()
    pictures = Counter(str(Path(name).parent) for name in files if name.endswith(".png"))
    assert pictures and max(pictures.values()) <= 4
    assert not [name for name in files if name.endswith(("DETAILS.md", "report.html"))]
    for name in files:
        if re.fullmatch(r"results/[^/]+/REPORT\.md", name):
            assert len(committed("show", f"HEAD:{name}").splitlines()) <= LONGEST


def test_rows_that_were_archived_are_still_read(tmp_path: Path) -> None:
    archived = sorted((ROOT / "results/archive").glob(f"*/{results.ROWS}"))
    assert archived
    for file in archived:
        rows = results.read_rows(file.parent)
        assert set(rows.env_id) <= set(results.read_environments(file.parent))
        assert (rows.status == "pass").sum() > 100
