"""REPORT.md: one environment on at most LONGEST lines, to be read in two minutes.

How to read it stands first, then a table for each network, as many as fit, those that most backends
were measured on before the others; the rest have a line each. Everything else is in DETAILS.md and
report.html.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from resfuse.bench.measuring.probes.processor import microarchitecture
from resfuse.bench.report.data import cells
from resfuse.bench.report.data.ladder import Line, Network, baseline_rows, networks
from resfuse.bench.report.data.result import Environment, Result
from resfuse.bench.report.sections.comparison_section import title
from resfuse.bench.report.sections.quantization_section import quantization_summary
from resfuse.bench.report.sections.served_section import served_sections
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.headline import noise
from resfuse.bench.report.tables.markdown import count, escape, listing
from resfuse.bench.report.tables.provenance import facts, opening

LONGEST = 150  # lines
SERVED_LINES = 40  # of the scenarios throughput and server
WIDTH = 110  # characters of a line of prose
# as bench/measuring/probes/idle.py has it: more than the background load of an idle system
BUSY_CORES = 0.25
MADE_HERE = (
    "`make report` writes DETAILS.md (every row, depth scaling, rooflines, convolutions, studies) "
    "and report.html (the same rows, to sort and filter) beside this page."
)
GUIDE = (
    "`1.25 ±0.02` under *than onnxrt*: 1.25 times faster than ONNX Runtime, with a 95 % interval "
    "of 1.23 to 1.27. The two took turns in one process; it is the median of the paired ratios.",
    "`~` marks an indirect ratio: the two took turns with eager in processes of their own, and "
    "their speed-ups are divided. `same`: the interval contains 1. A dash was not measured.",
    "ms is the median time of a batch, taken beside eager. Rows were taken at different times: "
    "compare them by their ratios, not by ms.",
    "Error is relative, against fp64 with the same weights, of the worst photograph; a backend "
    "fails that is off by more than twice eager's own error. Peak MB is taken in a run of its own.",
    "Set-up is everything before the first answer, with caches as they were (an engine's first "
    "build measures its candidates and takes longer).",
)
OF_INT8 = (
    "int8: each backend quantizes the network in its own way on the same 64 photographs; eager has "
    "no int8 and is timed in fp32. An error may be twice that of a simulation in fp32. SQNR is the "
    "signal-to-noise ratio of the worst photograph, top-1 the share with fp64's top class."
)
OF_A_ROW = {"peak, MB": "peak_mem_mb", "error": "rel_l2_err", "set-up, s": "setup_s"}
OF_A_ROW_IN_INT8 = {
    "images/s": "infer_samples_per_sec", "SQNR, dB": "sqnr_db", "top-1": "top1_agree", **OF_A_ROW,
}  # fmt: skip
FACTS = (
    "cpu",
    "cpu_model",
    "cpu_isa",
    "threads",
    "memory_gb",
    "gpu_memory_gb",
    "driver",
    "system",
    "python",
    "torch",
    "triton",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "commit",
)


def short_report(
    environment: Environment, images: Mapping[str, str], studies: Sequence[str] = ()
) -> list[str]:
    """Returns the blocks of the page.

    Args:
        environment: the only one on the page.
        images: "headline" and "growth" -> markdown of the image, where they could be drawn.
        studies: what it says of pages beside it (study_pages.py).
    """
    found = networks(environment)
    every = [*environment.results, *environment.served_results]
    before = [
        f"# resfuse on {_device(environment)}",
        f"{opening(environment)} {_measured(every)}".strip(),
        *(["## How to read this", _guide(found)] if every else []),
        images.get("headline", ""),
    ]
    after = [
        images.get("growth", ""),
        *served_sections(environment, SERVED_LINES),
        *quantization_summary(environment.quantized),
        *studies,
        *_conditions(environment),
        *_not_passed(environment.results),
        "## Machine and versions",
        _machine(environment),
        MADE_HERE,
    ]
    room = LONGEST - _lines([*before, *after])
    return [block for block in (*before, *_tables(found, room), *after) if block]


def _guide(found: Sequence[Network]) -> str:
    int8 = any(network.setting.is_quantized for network in found)
    return "\n".join(_bullets([*GUIDE, *[OF_INT8] * int8]))


def _tables(found: Sequence[Network], room: int) -> list[str]:
    """Returns tables of the networks with most rows, and a line for each of the others."""
    order = sorted(range(len(found)), key=lambda i: -len(found[i].lines) * len(found[i].baselines))
    most = max((len(network.baselines) for network in found), default=0)
    order = [i for i in order if len(found[i].baselines) >= most - 1]
    blocks: list[str] = []
    for number in range(len(order), -1, -1):
        chosen = sorted(order[:number])
        full = [found[i] for i in chosen]
        rest = [network for i, network in enumerate(found) if i not in chosen]
        blocks = [*_full(full), *_rest(rest)]
        if _lines(blocks) <= room:
            break
    else:  # not even a line for each fits
        spare = _lines(blocks) - room
        blocks = _rest(found, leave_out=spare + 2)
    return blocks


def _full(found: Sequence[Network]) -> list[str]:
    blocks, last = [], None
    for network in found:
        if network.setting != last:
            blocks.append(f"## {title(network.setting)}")
            last = network.setting
            if (network.setting.weights, network.setting.images) != ("seeded", "bundled"):
                blocks.append(
                    f"Weights: {escape(network.setting.weights)}. "
                    f"Images: {escape(network.setting.images)}."
                )
        blocks += [f"### {escape(network.model)}, {network.img_size} px", table(network)]
    return blocks


def table(network: Network, batches: Sequence[int] | None = None) -> str:
    """Returns the markdown table of a network, or of some of its batches."""
    lines = [line for line in network.lines if batches is None or line.result.batch_size in batches]
    beside_eager = any(line.is_beside_eager for line in lines)
    columns = [("batch", True), ("backend", False), ("ms", True)]
    columns += [(f"than {network.setting.baseline_text(name)}", True) for name in network.baselines]
    columns[3:4] = [(f"faster {title}", right) for title, right in columns[3:4]]
    metrics = OF_A_ROW_IN_INT8 if network.setting.is_quantized else OF_A_ROW
    columns += [*((title, True) for title in metrics), ("other load, cores", True)]
    rows = []
    for line in lines:
        result = line.result
        comparable = line.is_beside_eager or not beside_eager
        ms = _number(result, "p50_ms") if comparable else cells.EMPTY
        row = [str(result.batch_size), escape(line.label), ms]
        row += [_ratio(line, name) for name in network.baselines]
        row += [_number(result, name) for name in metrics.values()]
        rows.append([*row, other_load(result)])
    if all(row[-1] == cells.EMPTY for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    titles, right = zip(*columns, strict=True)
    return markdown.table(titles, right, rows)


def _ratio(line: Line, baseline: str) -> str:
    if baseline not in line.ratios:
        return cells.EMPTY
    ratio = line.ratios[baseline]
    return "1" if ratio is None else ratio.text()


def _rest(found: Sequence[Network], leave_out: int = 0) -> list[str]:
    """Returns the fastest backend of each network and batch, in one table. A network says how it
    was measured, unless that is what most were and float32."""
    if not found:
        return []
    baselines = list(dict.fromkeys(name for network in found for name in network.baselines))
    usual = Counter(network.setting for network in found).most_common(1)[0][0]
    rows = []
    for network in found:
        for batch in network.batches:
            line = network.at(batch)[0]
            plain = network.setting == usual and usual.precision == "float32"
            words = "" if plain else f" ({title(network.setting)})"
            rows.append([
                f"{escape(network.model)}, {network.img_size} px{words}", str(batch),
                escape(line.label), _number(line.result, "p50_ms"),
                *(_ratio(line, name) for name in baselines),
            ])  # fmt: skip
    shown = rows[: max(0, len(rows) - leave_out)]
    titles = ["network", "batch", "fastest", "ms", *(f"than {name}" for name in baselines)]
    blocks = ["## Other networks, the fastest backend of each"]
    if shown:
        right = [False, True, False, *(True for _ in titles[3:])]
        blocks.append(markdown.table(titles, right, shown))
    if hidden := len(rows) - len(shown):
        blocks.append(f"{count(hidden, 'more line')}: see DETAILS.md.")
    return blocks


def _conditions(environment: Environment) -> list[str]:
    """Returns the section on noise and on other load while rows were measured."""
    words = [text for comparison in baseline_rows(environment) if (text := noise(comparison))]
    if text := beside_other_work([*environment.results, *environment.served_results]):
        words.append(text)
    return ["## Noise", "\n".join(_bullets(words))] if words else []


def beside_other_work(results: Sequence[Result]) -> str:
    """Says how many of these rows were taken while other processes used the machine, or ""."""
    measured = [result for result in results if result.measured]
    busy = [r for r in measured if is_beside_other_work(r)]
    if not busy:
        return ""
    loads = [r.numbers["other_load"] for r in busy if "other_load" in r.numbers]
    most = f", at most {max(loads):.1f} cores" if loads else ""
    return (
        f"{len(busy)} of {count(len(measured), 'row')} {'was' if len(busy) == 1 else 'were'} taken "
        f"beside other work (other processes kept more than {BUSY_CORES:g} cores busy{most}): "
        "their times are too long and their intervals wide."
    )


def is_beside_other_work(result: Result) -> bool:
    """Returns whether other processes ran beside a row, by the load during the timed rounds; older
    rows only say whether the machine was idle before them."""
    if "other_load" in result.numbers:
        return result.numbers["other_load"] > BUSY_CORES
    return "other processes" in result.throttle


def other_load(result: Result) -> str:
    """Returns the cell of a row: cores that other processes used while it was timed."""
    load = result.numbers.get("other_load")
    if load is None:
        return "busy" if is_beside_other_work(result) else cells.EMPTY
    return f"{load:.2f}"


def _not_passed(results: Sequence[Result]) -> list[str]:
    """Returns a line for each backend that failed or cannot run here."""
    lines = []
    for backend in dict.fromkeys(result.backend for result in results):
        own = [result for result in results if result.backend == backend]
        failed = [result for result in own if result.status != "pass"]
        if failed:
            lines.append(f"- {escape(backend)}: {_why(failed, len(own))}")
    lines.sort(key=lambda line: ": cannot run here: " in line)
    return ["## Failures and backends that cannot run here", "\n".join(lines)] if lines else []


def _why(failed: Sequence[Result], measured: int) -> str:
    reason, number = Counter(" ".join(r.error.split()) for r in failed).most_common(1)[0]
    reason = (
        escape(reason if len(reason) <= WIDTH else f"{reason[:WIDTH]} ...") or "no reason given"
    )
    if all(result.status == "unavailable" for result in failed) and len(failed) == measured:
        return f"cannot run here: {reason}"
    statuses = Counter(result.status for result in failed)
    words = listing([f"{n} {status}" for status, n in statuses.most_common()])
    often = "" if number == len(failed) else " (the most frequent reason)"
    return f"{words} of {count(measured, 'case')}: {reason}{often}"


def _device(environment: Environment) -> str:
    """Returns the device, with the design of a processor whose name does not say it."""
    chip = microarchitecture(environment.facts)
    is_named = environment.facts.get("device") == "cpu" and chip
    return listing([escape(name) for name in environment.device_names]) + (
        f" ({chip})" if is_named else ""
    )


def _measured(results: Sequence[Result]) -> str:
    """Says on which days the rows were measured."""
    days = sorted(result.timestamp[:10] for result in results)
    if not days:
        return ""
    return f"Measured on {escape(days[0])}{f' to {escape(days[-1])}' * (days[0] != days[-1])}."


def _machine(environment: Environment) -> str:
    known = facts(environment)
    words = [f"{key} {escape(known[key])}" for key in FACTS if key in known]
    return "\n".join(textwrap.wrap("; ".join(words) + ".", WIDTH, break_on_hyphens=False))


def _number(result: Result, name: str) -> str:
    return cells.number(result.numbers.get(name))


def _bullets(texts: Sequence[str]) -> list[str]:
    return [
        textwrap.fill(f"- {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for text in texts
    ]


def _lines(blocks: Sequence[str]) -> int:
    """Returns the number of lines that blocks take on the page, each followed by an empty one."""
    return sum(block.count("\n") + 2 for block in blocks if block)
