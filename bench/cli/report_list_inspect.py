"""`resfuse report`, `list` and `inspect`: what there is, without measuring anything."""

import argparse
import sys
from pathlib import Path

from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick
from resfuse.bench.records import results
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.layer_row import SHEET as KERNEL_SHEET
from resfuse.bench.records.quantization_sheet import NETWORKS
from resfuse.bench.running.listing import LISTS, models_of
from resfuse.bench.trainings.degradation_sheet import SHEET as DEGRADATION_SHEET
from resfuse.bench.trainings.training_sheet import SHEET as TRAINING_SHEET


def report(args: argparse.Namespace) -> int:
    """`resfuse report`: from rows to pages, without measuring anything."""
    from resfuse.bench.report import HTML, write_merged_report, write_report, written
    from resfuse.bench.report.data.lacking import PAGE, lacking

    folders = _results_folders(args.results)
    if args.out is not None:
        print(write_merged_report(folders, args.out))
        return 0
    for folder in folders:
        page = write_report(folder)
        print(page)
        if lacking(PAGE):
            stderr().print(written(page), highlight=False, soft_wrap=True)
        else:
            print(page.with_name(HTML))
    return 0


def list_registry(args: argparse.Namespace) -> int:
    """`resfuse list [what]`: the registries as tables."""
    console = stdout()
    if args.what == "models":
        source, *more = args.source or ["resfuse"]
        console.print(models_of(source, [*args.patterns, *more]))
        return 0
    if args.patterns or args.source:
        raise UsageError("NAME and --source are of `resfuse list models`")
    for what in [args.what] if args.what else LISTS:
        console.print(LISTS[what]())
    return 0


def inspect(args: argparse.Namespace) -> int:
    """`resfuse inspect`: what the kernels compile to; 1 if one of them should not ship so."""
    from resfuse.bench.cli.inspect_table import summary, table, write_csv
    from resfuse.kernels.gpu.inspect.inspect import inspect as compile_all
    from resfuse.kernels.gpu.inspect.inspect import problems, require_compiler
    from resfuse.kernels.gpu.inspect.targets import DEFAULT_TARGETS, TARGETS
    from resfuse.kernels.gpu.registry import KERNELS

    kernels = pick("--kernel", args.kernel, list(KERNELS))
    targets = pick("--target", args.target or DEFAULT_TARGETS, list(TARGETS))
    if args.csv is not None and not args.csv.parent.is_dir():
        raise UsageError(f"argument --csv: {args.csv.parent} is no folder")
    try:
        require_compiler()
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    found = []
    with stderr().status("Compiling") as status:
        for result in compile_all(kernels, targets):
            found.append(result)
            status.update(f"Compiling: {len(found)} done, {result.kernel} {result.target}")
    piped = None if sys.stdout.isatty() else 160  # columns: rich takes 80, and breaks the labels
    stdout(piped).print(table(found))
    for line in summary(found):
        stdout().print(line, highlight=False, soft_wrap=True)
    if args.csv is not None:
        write_csv(found, args.csv)
    return int(any(problems(result) for result in found))


def _results_folders(given: list[Path]) -> list[Path]:
    """Folders with rows of any kind: each given one, or else those in it."""
    kinds = (CASES, KERNEL_SHEET, DEGRADATION_SHEET, TRAINING_SHEET, NETWORKS)
    sheets = [sheet.file for sheet in kinds]
    folders = []
    for folder in given:
        inside = (
            [folder]
            if any((folder / sheet).exists() for sheet in sheets)
            else sorted({path.parent for sheet in sheets for path in folder.glob(f"*/{sheet}")})
        )
        if not inside:
            raise UsageError(
                f"argument --results: no {results.ROWS} in {folder} or in a folder of it; "
                "`resfuse bench` makes one"
            )
        folders += inside
    return folders
