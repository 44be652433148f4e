"""What readers see: results that still make their report, a README that quotes them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from resfuse.bench import results
from resfuse.bench.report import write_report

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob(f"*/{results.ROWS}"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_report_is_made_from_the_rows_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    """Regenerated from the CSV files alone, the page is the same to the byte."""
    for file in folder.glob("*.csv"):
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


def test_the_readme_quotes_the_report() -> None:
    """Every line of its results table stands in the report it links to, as both are committed.

    `make bench` on a machine like ours appends to that folder and writes its report anew.
    """
    report = re.search(r"\]\((results/[^)]*)/REPORT\.md\)", README)
    assert report
    show = ["git", "show", f"HEAD:{report[1]}/REPORT.md"]
    committed = subprocess.run(show, cwd=ROOT, capture_output=True, text=True)
    if committed.returncode != 0:
        pytest.skip("not a git checkout")
    page = committed.stdout.splitlines()
    table = [line for line in README.splitlines() if line.startswith("|") and "[" in line]
    quoted = [line for line in table if "](" not in line]
    assert len(quoted) >= 6
    assert set(quoted) <= set(page)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) < 120
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []
