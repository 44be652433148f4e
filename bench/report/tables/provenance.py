"""What was measured on what, and which rows a page is made from."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from resfuse.bench.report.data.palette import backend_rank
from resfuse.bench.report.data.result import Environment
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.markdown import count, escape, listing

MOST_NAMED = 8  # models or backends told by name in a sentence
NO_FACTS = "environments.csv holds no facts of this environment."
MODE_NAMES = {"inference": "inference", "train": "training steps"}


def opening(environment: Environment, escape: Callable[[str], str] = markdown.escape) -> str:
    """Returns a sentence on what was measured on which machine, and how many cases passed.

    Args:
        escape: makes foreign text harmless where the sentence goes.
    """
    results = environment.results
    if not results and environment.served:
        every = environment.served_results
        passed = sum(result.status == "pass" for result in every)
        models = _named(_distinct(result.model for result in every), "model", escape)
        return (
            f"{models} under the scenarios throughput and server: {passed} of "
            f"{count(len(every), 'case')} passed every check."
        )
    if not results:
        partly = environment.workloads or environment.experiments
        what = "network was measured as a whole" if partly else "case was measured"
        if environment.quantized and not partly:
            what = "network was timed"
        return f"No {what} in this environment."
    settings = [comparison.setting for comparison in environment.comparisons]
    modes = listing([MODE_NAMES[mode] for mode in _distinct(s.mode for s in settings)])
    precisions = listing([escape(name) for name in _distinct(s.precision for s in settings)])
    batches = listing([str(batch) for batch in sorted({r.batch_size for r in results})])
    sizes = listing([str(size) for size in sorted({r.img_size for r in results})])
    backends = _distinct(r.backend for r in sorted(results, key=lambda r: backend_rank(r.backend)))
    counts = Counter(result.status for result in results)
    unable = f", {counts['unavailable']} could not run here" if counts["unavailable"] else ""
    failed = len(results) - counts["pass"] - counts["unavailable"]
    return (
        f"{modes.capitalize()} of {_named(_distinct(r.model for r in results), 'model', escape)} "
        f"at batch {batches} and {sizes} px in {precisions}, "
        f"with {_named(backends, 'backend', escape)}, "
        f"on {listing([escape(name) for name in environment.device_names])}: "
        f"{counts['pass']} of {count(len(results), 'case')} passed every check{unable}"
        f"{f', {failed} failed' if failed else ''}."
    )


def made_from(environment: Environment, escape: Callable[[str], str] = markdown.escape) -> str:
    """Returns text on the number of rows shown and left out, their time span and commits; `escape`
    is as for `opening`."""
    served = environment.served_results
    results = [*environment.results, *served]
    older = environment.rows_read - environment.incomplete - len(results)
    rows = count(environment.rows_read, "row")
    stand = rows if environment.rows_read == len(results) else f"{len(results)} of {rows}"
    parts = [f"Made from {stand} in rows.csv"]
    if older:
        parts.append(
            f"{count(older, 'older row')} of the same cases {'is' if older == 1 else 'are'} kept "
            "there and not shown"
        )
    if served:
        rows = count(len(served), "row")
        parts.append(f"{rows} of the scenarios throughput and server in tables of their own")
    if environment.incomplete:
        parts.append(f"{count(environment.incomplete, 'incomplete line')} left out")
    if results:
        first, last = min(r.timestamp for r in results), max(r.timestamp for r in results)
        span = f"at {escape(first)}" if first == last else f"from {escape(first)} to {escape(last)}"
        parts.append(f"measured {span}")
    commits = Counter(result.commit for result in results)
    if len(commits) > 1:
        words = [f"{escape(commit)} ({count(n, 'row')})" for commit, n in commits.items()]
        parts.append(
            f"from {len(commits)} commits, which the tables do not tell apart: {listing(words)}"
        )
    return f"{'; '.join(parts)}."


def facts_table(environment: Environment) -> str:
    """Returns the machine and versions as a table."""
    cells = [[escape(key), escape(value)] for key, value in facts(environment).items()]
    note = "" if environment.facts else f"\n\n{NO_FACTS}"
    return markdown.table(["fact", "value"], [False, False], cells) + note


def facts(environment: Environment) -> dict[str, str]:
    """Returns the machine and versions, without the ceilings, which are shown where they are
    used."""
    lines = {"env_id": environment.env_id, "device_name": listing(environment.device_names)}
    lines |= {
        key: value for key, value in environment.facts.items() if not key.startswith("ceiling_")
    }
    commits = [r.commit for r in (*environment.results, *environment.served_results)]
    commits += [r.commit for workload in environment.workloads for r in workload.results]
    commits += [t.commit for experiment in environment.experiments for t in experiment.trainings]
    lines["commit"] = listing(_distinct(commits))
    return {key: value for key, value in lines.items() if value}


def _named(names: Sequence[str], noun: str, escape: Callable[[str], str]) -> str:
    """Returns text such as `2 models (resnet18 and resnet50)`, without names if there are many."""
    words = f" ({listing([escape(name) for name in names])})" if len(names) <= MOST_NAMED else ""
    return count(len(names), noun) + words


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
