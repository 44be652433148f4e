"""Failures and unavailable backends with the reason; equal reasons are told once."""

from collections.abc import Sequence
from dataclasses import dataclass

from resfuse.bench.records.outcome import STATUSES
from resfuse.bench.report.data.result import Result, model_name
from resfuse.bench.report.tables import markdown

LONGEST_REASON = 300  # characters; a compiler's whole output is in rows.csv


@dataclass(frozen=True)
class Failure:
    """Cases that ended alike, for one reason."""

    status: str
    reason: str  # on one line, cut at LONGEST_REASON
    results: tuple[Result, ...]


def failures(results: Sequence[Result]) -> str:
    """Returns a table of status, number of cases, cases and reason; "" where everything passed."""
    found = failure_groups(results)
    if not found:
        return ""
    return markdown.table(
        ["status", "cases", "which", "reason"],
        [False, True, False, False],
        [
            [
                failure.status,
                str(len(failure.results)),
                markdown.escape(which(failure.results, results)),
                markdown.escape(failure.reason),
            ]
            for failure in found
        ],
    )


def nothing_failed(results: Sequence[Result]) -> str:
    return f"Nothing: {markdown.count(len(results), 'case')} ran and passed every check."


def failure_groups(results: Sequence[Result]) -> list[Failure]:
    """Groups what did not pass, in the order of STATUSES."""
    failed = [result for result in results if result.status != "pass"]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(failed, key=lambda r: STATUSES.index(r.status)):
        groups.setdefault((result.status, _reason(result.error)), []).append(result)
    return [Failure(status, why, tuple(group)) for (status, why), group in groups.items()]


def _reason(error: str) -> str:
    line = " ".join(error.split()) or "no reason was recorded"
    return (
        line
        if len(line) <= LONGEST_REASON
        else f"{line[:LONGEST_REASON]} ... (whole text: rows.csv)"
    )


def which(results: Sequence[Result], among: Sequence[Result]) -> str:
    """Returns text that names cases: `onnxrt: resnet18 at batch 1, 8; fused: all 5 models at batch
    8`."""
    every_model = {model_name(result, among) for result in among}
    batches: dict[str, dict[str, list[str]]] = {}
    for result in results:
        model = model_name(result, among)
        batches.setdefault(result.label, {}).setdefault(model, []).append(str(result.batch_size))
    per_label: dict[str, list[str]] = {}
    for label, of_model in batches.items():
        alike: dict[str, list[str]] = {}
        for model, sizes in of_model.items():
            alike.setdefault(", ".join(sizes), []).append(model)
        cases = [
            f"all {len(models)} models at batch {sizes}"
            if len(models) > 2 and set(models) == every_model
            else f"{', '.join(models)} at batch {sizes}"
            for sizes, models in alike.items()
        ]
        per_label.setdefault("; ".join(cases), []).append(label)
    return "; ".join(f"{', '.join(names)}: {cases}" for cases, names in per_label.items())
