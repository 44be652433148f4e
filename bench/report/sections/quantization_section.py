"""The page's part on trained networks in int8: what is lost, by tool and method."""

from collections.abc import Mapping, Sequence

from resfuse.bench.records.quantization_sheet import LAYERS, NETWORKS
from resfuse.bench.report.data.quantized_networks import QuantizedNetwork
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.markdown import escape

TITLE = "## Trained networks in int8"
WORST = 5  # layers that a table names
MEANING = (
    "Every tool takes ranges from the same images, none of which is measured. SQNR is the ratio of "
    "signal to noise of all scores, beside the network in fp32; *agree*, the images of which both "
    "say the same class, and *changed* the others."
)
OF_LABELS = (
    "*Lost* and *gained* are images whose label int8 misses and fp32 does not, and the other way "
    "round; p is McNemar's exact test of the two (1: int8 gains as many as it loses; below 0.05: a "
    "difference that chance seldom makes)."
)
OF_PHOTOGRAPHS = (
    "Photographs have no labels here, so nothing is said of accuracy, and crops of one photograph "
    "are not independent of each other."
)
# Title -> column and format; the columns that no row has a number in are left out.
NUMBERS = {
    "SQNR, dB": ("sqnr_db", ".1f"), "agree, %": ("top1_agree_pct", ".2f"),
    "top-1, %": ("top1_pct", ".2f"), "changed": ("answers_changed", ".0f"),
    "lost": ("answers_lost", ".0f"), "gained": ("answers_gained", ".0f"), "p": ("p_value", ".2g"),
}  # fmt: skip


def quantization_sections(
    networks: Sequence[QuantizedNetwork], images: Sequence[Mapping[str, str]]
) -> list[str]:
    """Returns the blocks for all networks of an environment.

    Args:
        images: of each network, markdown by the plot's name.
    """
    if not networks:
        return []
    labelled = {_has_labels(network) for network in networks if network.passed}
    texts = [MEANING, *[OF_LABELS] * (True in labelled), *[OF_PHOTOGRAPHS] * (False in labelled)]
    blocks = [TITLE, " ".join(texts)]
    for network, pictures in zip(networks, images, strict=True):
        blocks += [f"### {escape(network.model)} in int8", _about(network)]
        if network.passed:
            blocks.append(_table(network))
        blocks += pictures.values()
        if worst := _worst(network):
            blocks.append(worst)
        for way in network.ways:
            if way.status != "pass":
                blocks.append(
                    f"- {escape(way.tool)}, {escape(way.method)}: {way.status}: {escape(way.error)}"
                )
    return blocks


def quantization_summary(networks: Sequence[QuantizedNetwork]) -> list[str]:
    """Returns the blocks of the short page: the best that each tool gets of each network."""
    lines = []
    for network in networks:
        best: dict[str, tuple[float, str]] = {}
        for way in network.passed:
            if "sqnr_db" in way.numbers:
                found = way.numbers["sqnr_db"], way.method
                best[way.tool] = max(found, best.get(way.tool, found))
        if best:
            tools = [
                f"{escape(tool)} {ratio:.1f} dB ({escape(method)})"
                for tool, (ratio, method) in best.items()
            ]
            lines.append(f"- {escape(network.model)}: {markdown.listing(tools)}.")
    if not lines:
        return []
    about = (
        "Signal to noise of the scores beside fp32, with the best ranges of each tool, by "
        "`resfuse study quantization`; DETAILS.md has all ways, layers and answers that changed."
    )
    return [TITLE, about, "\n".join(lines)]


def _about(network: QuantizedNetwork) -> str:
    commits = markdown.listing(list(dict.fromkeys(escape(way.commit) for way in network.ways)))
    exact = [way.numbers["fp32_top1_pct"] for way in network.passed if "top1_pct" in way.numbers]
    top1 = f" In fp32 its top-1 accuracy is {exact[0]:.2f} %." if exact else ""
    return (
        f"Weights: {escape(network.origin)}. Images: {escape(network.data)}; "
        f"{network.calibration_images} to calibrate on, {network.test_images} measured.{top1} "
        f"Rows: {NETWORKS.file}, commit {commits}."
    )


def _has_labels(network: QuantizedNetwork) -> bool:
    return any("top1_pct" in way.numbers for way in network.passed)


def _table(network: QuantizedNetwork) -> str:
    shown = {
        title: column
        for title, column in NUMBERS.items()
        if any(column[0] in way.numbers for way in network.passed)
    }
    rows = [
        [
            escape(way.tool),
            escape(way.method),
            *(
                format(way.numbers[name], digits) if name in way.numbers else ""
                for name, digits in shown.values()
            ),
        ]
        for way in network.passed
    ]
    right = (False, False, *[True] * len(shown))
    return markdown.table(("tool", "ranges", *shown), right, rows)


def _worst(network: QuantizedNetwork) -> str:
    """Names the layers that int8 harms most, by the best method there is."""
    ways = [way for way in network.passed if way.layers]
    if not ways:
        return ""
    best = max(ways, key=lambda way: way.numbers.get("sqnr_db", float("-inf")))
    layers = sorted(best.layers, key=lambda layer: layer.sqnr_db)[:WORST]
    named = markdown.listing([f"{escape(each.name)} ({each.sqnr_db:.1f} dB)" for each in layers])
    return (
        "Layers that int8 harms most, each quantised alone in our engine with ranges by "
        f"{escape(best.method)}, and the SQNR of what it computes: {named}. All layers: "
        f'{LAYERS.file}. `build_engine(..., keep=["NAME"])` leaves layers in float32.'
    )
