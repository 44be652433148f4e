"""Puts pages together and writes them: for one results folder, or for several side by side.

Each page exists twice, made from the same comparisons: as markdown with plots, to be read where the
folder is browsed, and as one HTML file, to be asked questions.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from resfuse.bench.errors import UsageError
from resfuse.bench.report import markdown
from resfuse.bench.report.agreement_section import agreement_sections
from resfuse.bench.report.convolutions import convolution_sections
from resfuse.bench.report.degradation_section import degradation_sections
from resfuse.bench.report.guide import guide
from resfuse.bench.report.lacking import DRAWING, PAGE, lacking
from resfuse.bench.report.palette import looks
from resfuse.bench.report.provenance import facts_table, made_from, opening
from resfuse.bench.report.result import Comparison, Environment
from resfuse.bench.report.section import PLOTS, section, title
from resfuse.bench.report.select import read_folders
from resfuse.bench.report.trainings import Experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "REPORT.md"
HTML = "report.html"
NOTHING = "There is nothing to report: no case has been measured yet, rows.csv holds no rows."
APART = (
    "Each environment has a section of its own. Numbers are never compared across environments: "
    "other devices, versions and settings make a difference that is not the backend's."
)


def write_report(folder: Path) -> Path:
    """Writes REPORT.md with its plots, and report.html, into a results folder, from the CSV files
    there alone. Without matplotlib there are no plots, without plotly there is no report.html:
    `written` says so.

    Returns:
        the path of REPORT.md.

    Raises:
        UsageError: the folder has no results, they cannot be read, or the page cannot be written.
    """
    source = "`resfuse report --results DIR`, with DIR the folder this page lies in,"
    environments = read_folders([folder])
    page = _write(environments, folder / REPORT, source)
    if not lacking(PAGE):
        _write_html(environments, folder / HTML, source)
    return page


def written(page: Path) -> str:
    """A line for the terminal on what write_report wrote, and which package it lacked."""
    packages = lacking(PAGE)
    if not packages:
        return f"Report: {page} and {HTML}"
    lost = f"no plots and no {HTML}" if lacking(DRAWING) else f"no {HTML}"
    return f"Report: {page}; {lost} for want of {packages} on this machine"


def write_merged_report(folders: list[Path], out: Path) -> Path:
    """Writes one page over several results folders: markdown with its plots beside it, or, where
    the path ends in .html, one HTML file.

    Rows of one environment that lie in several folders count in the order of the folders.

    Args:
        folders: results folders.
        out: the page's path, e.g. results/REPORT.md or all.html.

    Returns:
        out.

    Raises:
        UsageError: no folder is given, one cannot be read, or the page cannot be written, for want
            of a package, too.
    """
    if not folders:
        raise UsageError("argument --results: no results folder is given; name at least one")
    names = " ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    command = f"resfuse report --results {names} --out {out.name}".replace("`", "")
    source = f"`{command}`, run beside those folders,"
    write = _write_html if out.suffix == ".html" else _write
    return write(read_folders(folders), out, source)


def _write_html(environments: Sequence[Environment], path: Path, source: str) -> Path:
    if packages := lacking(PAGE):
        raise UsageError(f"report {path} cannot be written for want of {packages} on this machine")
    from resfuse.bench.report.html.page import render

    page = render(environments, source.replace("`", ""))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"report {path} cannot be written: {error.strerror or error}") from error
    return path


def _write(environments: Sequence[Environment], path: Path, source: str) -> Path:
    several = len(environments) > 1
    blocks = ["# resfuse: results of several environments", APART] if several else []
    names: set[str] = set()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for environment in environments:
            own = _environment(environment, path.parent, f"{environment.env_id}-" * several, names)
            # one level down where the page has a title of its own
            blocks += [f"#{block}" if several and block.startswith("#") else block for block in own]
        if not environments:
            blocks += ["# resfuse: no results", NOTHING]
        modes = {c.setting.mode for e in environments for c in e.comparisons}
        blocks += guide(modes, source)
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"report {path} cannot be written: {error.strerror or error}") from error
    return path


def _environment(environment: Environment, folder: Path, prefix: str, names: set[str]) -> list[str]:
    devices = markdown.listing([markdown.escape(name) for name in environment.device_names])
    told_apart = f", environment {markdown.escape(environment.env_id)}" if prefix else ""
    blocks = [
        f"# resfuse on {devices}{told_apart}",
        opening(environment),
        made_from(environment),
        facts_table(environment),
    ]
    for comparison in environment.comparisons:
        blocks += section(comparison, _draw(comparison, folder, prefix, names))
    blocks += convolution_sections(environment)
    for study, sections, plots, experiments in (
        ("degradation", degradation_sections, "plot_degradation", environment.degradation),
        ("training", agreement_sections, "plot_agreement", environment.training),
    ):
        stem = f"{prefix}{study}"
        drawn = [_draw_experiment(one, plots, folder, stem, names) for one in experiments]
        blocks += sections(experiments, drawn)
    return blocks


def _draw(comparison: Comparison, folder: Path, prefix: str, names: set[str]) -> dict[str, str]:
    """Draws a comparison's plots into the folder.

    Args:
        comparison: whose plots.
        folder: where they go.
        prefix: of the file names, tells environments apart.
        names: file names this page has taken; those taken here are added.

    Returns:
        name in PLOTS -> markdown of the image.
    """
    if not comparison.measured or lacking(DRAWING):
        return {}
    from matplotlib import style

    from resfuse.bench.report import figure

    setting = comparison.setting
    appearance = looks(result.backend for result in comparison.results)
    images = {}
    for name, plot in PLOTS.items():
        with style.context(figure.STYLE):
            drawn = plot.draw(comparison, appearance)
            if drawn is None:
                continue
            file_name = _free(f"{prefix}{name}-{setting.mode}-{setting.precision}", names)
            figure.save(drawn, folder / file_name)
        images[name] = markdown.image(file_name, f"{plot.alt}; {title(setting)}")
    return images


def _draw_experiment(
    experiment: Experiment,
    module: str,
    folder: Path,
    stem: str,
    names: set[str],
) -> dict[str, str]:
    """As _draw, for the plots of a study that trains, the module's PLOTS; their files' names begin
    with `stem`."""
    if lacking(DRAWING):
        return {}
    from matplotlib import style

    from resfuse.bench.report import figure

    plots: Mapping[str, tuple[Callable[[Experiment], Figure | None], str]]
    plots = import_module(f"resfuse.bench.report.{module}").PLOTS
    images = {}
    for name, (draw, alt) in plots.items():
        with style.context(figure.STYLE):
            drawn = draw(experiment)
            if drawn is None:
                continue
            file_name = _free(f"{stem}-{name}-{experiment.data}", names)
            figure.save(drawn, folder / file_name)
        images[name] = markdown.image(file_name, alt)
    return images


def _free(stem: str, names: set[str]) -> str:
    """A file name that is safe everywhere and not taken; takes it."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)
    candidates = chain([f"{safe}.png"], (f"{safe}-{n}.png" for n in count(2)))
    name = next(candidate for candidate in candidates if candidate not in names)
    names.add(name)
    return name
