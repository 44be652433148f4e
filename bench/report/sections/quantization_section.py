"""The page's part on trained networks in int8: what is lost, by tool and method."""

from collections.abc import Mapping, Sequence

from resfuse.bench.records.quantization_sheet import LAYERS, NETWORKS
from resfuse.bench.report.data.quantized_networks import Quantized, QuantizedNetwork
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.markdown import escape

WORST = 5  # layers that a table names
MEANING = (
    "Every tool takes ranges from the same images, none of which is measured. SQNR is the ratio of "
    "signal to noise of all scores, beside the network in fp32; *agree*, the images of which both "
    "say the same class. *Lost* and *gained* are images whose label int8 misses and fp32 does not, "
    "and the other way round; p is McNemar's exact test of the two (1: int8 gains as many as it "
    "loses; below 0.05: a difference that chance seldom makes). Photographs have no labels here, "
    "and crops of one photograph are not independent of each other."
)
TITLES = ("tool", "ranges", "SQNR, dB", "agree, %", "top-1, %", "changed", "lost", "gained", "p")


def quantization_sections(
    networks: Sequence[QuantizedNetwork], images: Sequence[Mapping[str, str]]
) -> list[str]:
    """Returns the blocks for all networks of an environment.

    Args:
        images: of each network, markdown by the plot's name.
    """
    if not networks:
        return []
    blocks = ["## Trained networks in int8", MEANING]
    for network, pictures in zip(networks, images, strict=True):
        blocks += [f"### {escape(network.model)} in int8", _about(network)]
        if network.passed:
            right = (False, False, *[True] * 7)
            blocks.append(markdown.table(TITLES, right, [_cells(way) for way in network.passed]))
        blocks += pictures.values()
        if worst := _worst(network):
            blocks.append(worst)
        for way in network.ways:
            if way.status != "pass":
                blocks.append(
                    f"- {escape(way.tool)}, {escape(way.method)}: {way.status}: {escape(way.error)}"
                )
    return blocks


def _about(network: QuantizedNetwork) -> str:
    commits = markdown.listing(list(dict.fromkeys(escape(way.commit) for way in network.ways)))
    exact = [way.numbers["fp32_top1_pct"] for way in network.passed if "top1_pct" in way.numbers]
    top1 = f" In fp32 its top-1 accuracy is {exact[0]:.2f} %." if exact else ""
    return (
        f"Weights: {escape(network.origin)}. Images: {escape(network.data)}; "
        f"{network.calibration_images} to calibrate on, {network.test_images} measured.{top1} "
        f"Rows: {NETWORKS.file}, commit {commits}."
    )


def _cells(way: Quantized) -> list[str]:
    shown = (
        ("sqnr_db", ".1f"), ("top1_agree_pct", ".2f"), ("top1_pct", ".2f"),
        ("answers_changed", ".0f"), ("answers_lost", ".0f"), ("answers_gained", ".0f"),
        ("p_value", ".2g"),
    )  # fmt: skip
    numbers = [
        format(way.numbers[name], digits) if name in way.numbers else "" for name, digits in shown
    ]
    return [escape(way.tool), escape(way.method), *numbers]


def _worst(network: QuantizedNetwork) -> str:
    """Names the layers that int8 harms most, by the best method there is."""
    ways = [way for way in network.passed if way.layers]
    if not ways:
        return ""
    best = max(ways, key=lambda way: way.numbers.get("sqnr_db", float("-inf")))
    layers = sorted(best.layers, key=lambda layer: layer.sqnr_db)[:WORST]
    named = markdown.listing([f"{escape(each.name)} ({each.sqnr_db:.1f} dB)" for each in layers])
    return (
        f"Least, quantised alone with {escape(best.method)}: {named}. All layers: {LAYERS.file}; "
        'those may stay in float32 by `build_engine(..., keep=["NAME"])`.'
    )
