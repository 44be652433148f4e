"""The headline tables: every way to run a model, fastest first, losses and failures included."""

from itertools import groupby

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.result import Comparison, Result
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.column import (
    BACKEND,
    BATCH,
    IMAGES_PER_S,
    STATUS,
    THROTTLE,
    Column,
    of_count,
    of_metric,
    render,
)

COLUMNS: tuple[Column, ...] = (
    BATCH,
    BACKEND,
    IMAGES_PER_S,
    of_metric("p50, ms", "p50_ms"),
    of_metric("p90, ms", "p90_ms"),
    Column("speed-up over baseline [95 % interval]", cells.speedup, ("speedup",), right=False),
    of_metric("peak, MB", "peak_mem_mb"),
    of_metric("error vs fp64", "rel_l2_err"),
    of_metric("set-up, s", "setup_s"),
    of_metric("% of roofline (direct)", "sol_pct"),
    of_metric("J/image", "joules_per_image", optional=True),
    of_count("rounds", "rounds"),
    THROTTLE,
    STATUS,
)
# In front of the set-up's, for int8.
OF_INT8 = (of_metric("SQNR, dB", "sqnr_db"), of_metric("top-1 agree", "top1_agree", optional=True))


def headline(comparison: Comparison) -> list[str]:
    """Returns a heading, a line of facts and a table for each model and image size.

    Cases that are unavailable never ran; they are listed with the failures only.
    """
    ran = [result for result in comparison.results if result.status != "unavailable"]
    place = next(i for i, column in enumerate(COLUMNS) if column.metrics == ("setup_s",))
    more = OF_INT8 if comparison.setting.is_quantized else ()
    columns = *COLUMNS[:place], *more, *COLUMNS[place:]
    blocks = []
    for (model, size), group in groupby(ran, key=lambda r: (r.model, r.img_size)):
        results = sorted(group, key=_fastest_first)
        blocks += [f"### {markdown.escape(model)}, {size} px", _facts(results)]
        blocks.append(render(columns, results))
    return [block for block in blocks if block]


def noise(comparison: Comparison) -> str:
    """Says how noisy this run is by the baseline's ratios against itself; empty without any."""
    names = ("speedup_ci_low", "speedup_ci_high")
    own = [r for r in comparison.measured if r.is_baseline and all(n in r.numbers for n in names)]
    if not own:
        return ""
    low = min(r.numbers[names[0]] for r in own)
    high = max(r.numbers[names[1]] for r in own)
    beyond = sum(cells.excludes_one(*(r.numbers[n] for n in names)) for r in own)
    caution = ""
    if beyond:
        caution = (
            f" In {beyond} of {markdown.count(len(own), 'case')} that interval excludes 1 though "
            "nothing differed, so read speed-ups of that size with doubt."
        )
    return (
        "Noise of this run: timed against a second copy of itself, the baseline's speed-up lay "
        f"between {low:.3f} and {high:.3f} (all 95 % intervals together).{caution}"
    )


def _facts(results: list[Result]) -> str:
    """Returns parameters and multiply-accumulates of a model, from any row that has them."""
    names = {"param_count": "M parameters", "infer_gmacs": "GMACs an image (forward)"}
    found = [
        f"{cells.number(next(r.numbers[name] for r in results if name in r.numbers))} {noun}"
        for name, noun in names.items()
        if any(name in r.numbers for r in results)
    ]
    return f"{', '.join(found)}." if found else ""


def _fastest_first(result: Result) -> tuple[int, bool, float, str]:
    return (result.batch_size, not result.measured, -(result.images_per_s or 0), result.label)
