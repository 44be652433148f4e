"""Puts pages together and writes them: for one results folder, or for several side by side.

A results folder gets REPORT.md, one environment in at most 150 lines with at most two pictures,
which is committed; and, made again from the rows at any time, DETAILS.md with everything and
report.html to ask questions of. A page over several folders is one file with all environments.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from resfuse.bench.common.errors import UsageError
from resfuse.bench.report import study_pages
from resfuse.bench.report.data.experiments import Experiment
from resfuse.bench.report.data.lacking import DRAWING, PAGE, lacking
from resfuse.bench.report.data.ladder import EAGER, baseline_rows, networks
from resfuse.bench.report.data.palette import looks
from resfuse.bench.report.data.quantized_networks import QuantizedNetwork
from resfuse.bench.report.data.result import Comparison, Environment
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.report.sections.agreement_section import agreement_sections
from resfuse.bench.report.sections.comparison_section import GROWTH, PLOTS, section, title
from resfuse.bench.report.sections.convolutions_section import convolution_sections
from resfuse.bench.report.sections.degradation_section import degradation_sections
from resfuse.bench.report.sections.quantization_section import quantization_sections
from resfuse.bench.report.sections.served_section import served_sections
from resfuse.bench.report.short_report import short_report
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.guide import guide
from resfuse.bench.report.tables.provenance import facts_table, made_from, opening

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "REPORT.md"
DETAILS = "DETAILS.md"
HTML = "report.html"
PICTURES = "details"  # folder of the plots of DETAILS.md
NOTHING = "There is nothing to report: no case has been measured yet, rows.csv holds no rows."
APART = (
    "Each environment has a section of its own. Numbers are never compared across environments: "
    "other devices, versions and settings make a difference that is not the backend's."
)


def write_report(folder: Path) -> Path:
    """Writes REPORT.md, DETAILS.md with its plots, and report.html into a results folder, from the
    CSV files there alone. They show the environment that was measured last: rows of others, such as
    those that came with a checkout, stay in the CSV files. Without matplotlib there are no plots,
    without plotly there is no report.html: `written` says so.

    Returns:
        the path of REPORT.md.

    Raises:
        UsageError: the folder has no results, they cannot be read, or a page cannot be written.
    """
    source = "`resfuse report --results DIR`, with DIR the folder this page lies in,"
    newest = read_folders([folder])[:1]
    _write_details(newest, folder / DETAILS, source, PICTURES)
    _write_short(newest, folder / REPORT)
    if not lacking(PAGE):
        _write_html(newest, folder / HTML, source)
    return folder / REPORT


def written(page: Path) -> str:
    """Returns a line for the terminal on what write_report has written and which packages it
    lacked."""
    packages = lacking(PAGE)
    if not packages:
        return f"Report: {page}, {DETAILS} and {HTML}"
    lost = f"no plots and no {HTML}" if lacking(DRAWING) else f"no {HTML}"
    return f"Report: {page} and {DETAILS}; {lost} for want of {packages} on this machine"


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
    write = _write_html if out.suffix == ".html" else _write_details
    return write(read_folders(folders), out, source)


def _write_html(environments: Sequence[Environment], path: Path, source: str) -> Path:
    if packages := lacking(PAGE):
        raise UsageError(f"report {path} cannot be written for want of {packages} on this machine")
    from resfuse.bench.report.html.html_page import render

    page = render(environments, source.replace("`", ""))
    with _naming_file(path):
        path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _write_short(newest: Sequence[Environment], path: Path) -> Path:
    blocks = ["# resfuse: no results", NOTHING]
    with _naming_file(path):
        for environment in newest:
            images = _draw_short(environment, path.parent)
            blocks = short_report(environment, images, study_pages.blocks(path.parent))
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8", newline="\n")
    return path


def _write_details(
    environments: Sequence[Environment], path: Path, source: str, pictures: str = ""
) -> Path:
    """Writes everything of each environment, with plots beside the page or in the folder
    `pictures`."""
    several = len(environments) > 1
    blocks = ["# resfuse: results of several environments", APART] if several else []
    with _naming_file(path):
        gallery = _Gallery(path.parent, pictures)
        for environment in environments:
            own = _environment(environment, gallery, f"{environment.env_id}-" * several)
            # one level down where the page has a title of its own
            blocks += [f"#{block}" if several and block.startswith("#") else block for block in own]
        if not environments:
            blocks += ["# resfuse: no results", NOTHING]
        modes = {c.setting.mode for e in environments for c in (*e.comparisons, *e.served)}
        blocks += guide(modes, source)
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8", newline="\n")
    return path


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Makes the page's folder, and turns the operating system's errors into a sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(f"report {path} cannot be written: {error.strerror or error}") from error


class _Gallery:
    """The pictures of one page: files beside it or in a folder of it, each name taken once."""

    def __init__(self, page: Path, folder: str = "") -> None:
        self._page, self._folder = page, folder
        self._names: set[str] = set()

    def add(self, figure: "Figure", stem: str, alt: str) -> str:
        """Saves a figure under a name that is safe everywhere; returns markdown of the image."""
        from resfuse.bench.report.plots.figure import save

        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)
        candidates = chain([f"{safe}.png"], (f"{safe}-{n}.png" for n in count(2)))
        name = next(candidate for candidate in candidates if candidate not in self._names)
        self._names.add(name)
        (self._page / self._folder).mkdir(exist_ok=True)
        save(figure, self._page / self._folder / name)
        return markdown.image(f"{self._folder}/{name}" if self._folder else name, alt)


def _draw_short(environment: Environment, folder: Path) -> dict[str, str]:
    """Draws the two pictures of REPORT.md, as far as there are rows for them."""
    if lacking(DRAWING):
        return {}
    from matplotlib import style

    from resfuse.bench.report.plots import figure
    from resfuse.bench.report.plots.plot_growth import growth
    from resfuse.bench.report.plots.plot_headline import headline, headline_network

    gallery, images = _Gallery(folder), {}
    with style.context(figure.STYLE):
        if network := headline_network(networks(environment)):
            alt = f"How many times faster than eager each backend runs {network.model}"
            images["headline"] = gallery.add(headline(network), "headline", alt)
        for comparison in baseline_rows(environment):
            appearance = looks(result.backend for result in comparison.results)
            if drawn := growth(comparison, appearance):
                images["growth"] = gallery.add(drawn, "growth", GROWTH)
                break
    return images


def _environment(environment: Environment, gallery: _Gallery, prefix: str) -> list[str]:
    devices = markdown.listing([markdown.escape(name) for name in environment.device_names])
    environment_name = f", environment {markdown.escape(environment.env_id)}" if prefix else ""
    blocks = [
        f"# resfuse on {devices}{environment_name}",
        opening(environment),
        *[made_from(environment)] * bool(environment.rows_read),
        facts_table(environment),
    ]
    for comparison in environment.comparisons:
        blocks += section(comparison, _draw(comparison, gallery, prefix))
    blocks += served_sections(environment)
    blocks += convolution_sections(environment)
    for study, sections, plots, experiments in (
        ("degradation", degradation_sections, "plot_degradation", environment.degradation),
        ("training", agreement_sections, "plot_agreement", environment.training),
    ):
        stem = f"{prefix}{study}"
        drawn = [_draw_study(one, plots, gallery, stem, one.data) for one in experiments]
        blocks += sections(experiments, drawn)
    drawn = [
        _draw_study(one, "plot_quantization", gallery, f"{prefix}quantization", one.model)
        for one in environment.quantized
    ]
    blocks += quantization_sections(environment.quantized, drawn)
    return blocks


def _draw(comparison: Comparison, gallery: _Gallery, prefix: str) -> dict[str, str]:
    """Draws a comparison's plots.

    Args:
        comparison: whose plots.
        gallery: where they go.
        prefix: of the file names, tells environments apart.

    Returns:
        name in PLOTS -> markdown of the image.
    """
    if not comparison.measured or lacking(DRAWING):
        return {}
    from matplotlib import style

    from resfuse.bench.report.plots import figure

    setting = comparison.setting
    appearance = looks(result.backend for result in comparison.results)
    beside = "" if setting.baseline == EAGER else f"-beside-{setting.baseline}"
    images = {}
    for name, plot in PLOTS.items():
        with style.context(figure.STYLE):
            drawn = plot.draw(comparison, appearance)
            if drawn is None:
                continue
            stem = f"{prefix}{name}-{setting.mode}-{setting.precision}{beside}"
            images[name] = gallery.add(drawn, stem, f"{plot.alt}; {title(setting)}")
    return images


def _draw_study(
    studied: Experiment | QuantizedNetwork, module: str, gallery: _Gallery, stem: str, end: str
) -> dict[str, str]:
    """Draws the PLOTS of a study, as `_draw` does; their files' names begin with `stem`."""
    if lacking(DRAWING):
        return {}
    from matplotlib import style

    from resfuse.bench.report.plots import figure

    plots: Mapping[str, tuple[Callable[[object], Figure | None], str]]
    plots = import_module(f"resfuse.bench.report.plots.{module}").PLOTS
    images = {}
    for name, (draw, alt) in plots.items():
        with style.context(figure.STYLE):
            drawn = draw(studied)
            if drawn is not None:
                images[name] = gallery.add(drawn, f"{stem}-{name}-{end}", alt)
    return images
