"""`resfuse roofline MODEL...`: the least time of a network by how it is cut into kernels.

Without --gpu the rates are those measured on this device, with it those of data sheets: predicted,
for cards that need not be here.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.output_file import require_place
from resfuse.bench.common.selection import pick
from resfuse.bench.engine.roofline_table import Subject, layer_lines, lines, table, write_csv
from resfuse.bench.models.model_builder import Description, build, describe
from resfuse.bench.models.source import shape_text
from resfuse.bench.models.sources import choose, is_ours
from resfuse.bench.models.zoo import on_meta
from resfuse.bench.records import results
from resfuse.bench.records.case import PRECISIONS, Request
from resfuse.bench.records.precision_names import pick_precisions
from resfuse.bench.running import survey
from resfuse.bench.running.sweep import require_positive
from resfuse.kernels.engine.cost.cuts import CUTS, with_batch
from resfuse.kernels.engine.cost.gpus import GPUS, Gpu
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Graph

LEAST_COLUMNS = 120  # in fewer, rich leaves numbers out; a terminal wraps the lines instead
CEILING = "ceiling_{}_tflops"


@dataclass(frozen=True)
class Rates:
    """The rates of a device and where they are from."""

    device: Gpu
    predicted: bool
    source: str  # where the rates are from, a sentence
    cached: bool = False  # by a cache that may hold what a kernel leaves to the next

    def balance(self, math_mode: str) -> str:
        """Returns a phrase on the rates in one math mode, and the intensity above which arithmetic
        is the limit."""
        tflops, tb = self.device.tflops[math_mode], self.device.tb_per_s
        rate = f"{tflops:.4g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.4g} GFLOP/s"
        return (
            f"{rate} in {math_mode} and {1e3 * tb:.4g} GB/s, "
            f"balanced at {tflops / tb:.0f} FLOP a byte"
        )


def roofline(args: argparse.Namespace) -> int:
    """Prints a table for each device and precision."""
    asked = [name for part in args.models for name in part]
    models = choose("MODEL", asked, args.model_kwargs)
    batch_sizes = args.batch_size or [1, 32, 256]
    require_positive("--batch-size", batch_sizes)
    if args.img_size is not None:
        require_positive("--img-size", [args.img_size])
    precisions = pick_precisions(args.precision)
    gpus = pick("--gpu", args.gpu, list(GPUS)) if args.gpu else []
    if gpus and args.device != "auto":
        raise UsageError("argument --device: not with --gpu, which is about cards elsewhere")
    require_place("--csv", args.csv)
    status = stderr().status
    if gpus:
        precisions = precisions or ["float16"]
        devices = [_of_data_sheet(GPUS[name]) for name in gpus]
    else:
        with status("Measuring this device: how fast it copies and multiplies"):
            measured, precisions = _measured(args, precisions, models)
        devices = [measured]
    with status("Tracing"):
        subjects = list(_subjects(models, batch_sizes, precisions, args))
    console = stdout()
    console.width = max(console.width, LEAST_COLUMNS)
    for rates in devices:
        for precision in precisions:
            own = [one for one in subjects if one.precision == precision]
            _print(console, rates, own, args.layers)
    if args.csv is not None:
        write_csv(
            [(rates.device, rates.predicted, one) for rates in devices for one in subjects],
            args.csv, args.layers,
        )  # fmt: skip
    return 0


def _print(console: Console, rates: Rates, subjects: Sequence[Subject], layers: bool) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    mode = subjects[0].math_mode
    how = "predicted" if rates.predicted else "measured rates"
    say(f"{rates.device.name}, {subjects[0].precision}: {how}. {rates.source}")
    say(f"{rates.balance(mode)}. Launches are not in it.\n")
    if layers:
        for one in subjects:
            say(f"{one.model}, {one.img_size} pixels, batch {one.batch_size}: layer by layer")
            console.print(table(layer_lines(one, rates.device)))
            say("")
    console.print(table([line for one in subjects for line in lines(one, rates.device)]))
    say(
        "GFLOP and the least MB (2^20 bytes) are of an image, weights shared by the batch"
        + (" (of a call, layer by layer)" if layers else "")
        + "; the share behind bound by is that of the time."
    )
    for name, cut in CUTS.items():
        say(f"{name}: {cut.does}")
    caches = " What a CPU's caches hold need not pass through memory." * rates.cached
    say(
        "arithmetic alone: FLOPs of direct convolution; Winograd's needs up to 4 times fewer in a "
        f"3x3 of stride 1.{caches}"
    )
    say("")


def _subjects(
    models: Sequence[str],
    batch_sizes: Sequence[int],
    precisions: Sequence[str],
    args: argparse.Namespace,
) -> Iterator[Subject]:
    for precision in precisions:
        for model in models:
            of = describe(model, asked=args.input_shape, img_size=args.img_size)
            graph = _graph(of, precision)
            for n in batch_sizes:
                yield Subject(of.name, of.height, n, precision, with_batch(graph, n))


def _graph(of: Description, precision: str) -> Graph:
    """The network, ours on the meta device: nothing is computed."""
    dtype = getattr(torch, PRECISIONS[precision].storage)
    network = on_meta(of.name) if is_ours(of.name) else build(of.name)
    device = "meta" if is_ours(of.name) else "cpu"
    images = torch.zeros(of.batch_size or 1, of.channels, of.height, of.width, device=device)
    try:
        return capture(network.eval().to(dtype), images.to(dtype))[0]
    except ValueError as error:
        square = of.channels == 3 and not of.img_width
        size = f"{of.height} pixels" if square else shape_text(of.channels, of.height, of.width)
        raise UsageError(f"argument --img-size: {of.name} at {size}: {error}") from None


def _of_data_sheet(gpu: Gpu) -> Rates:
    sheet = f"dense rates of the data sheet ({gpu.source}), as if all reached them"
    source = f"Nothing was run: {sheet}."
    return Rates(gpu, True, source)


def _measured(
    args: argparse.Namespace, precisions: list[str], models: list[str]
) -> tuple[Rates, list[str]]:
    """Returns this device's rates and the precisions asked for, by default one that suits it."""
    request = Request(
        profile="quick", device=args.device, models=models[:1], backends=["eager"],
        batch_sizes=[1], precisions=precisions, memory_formats=[],
    )  # fmt: skip
    found = survey.survey(request, args.threads, ceilings=True)
    kind = str(found["device"]).split(":")[0]
    precisions = precisions or ["float32" if kind == "cpu" else "float16"]
    ceilings = {key: float(value) for key, value in found["ceilings"].items()}
    source = "Seen on this device just now: the fastest matrix product or convolution, and copy."
    recorded = _recorded(args.results / found["folder"], found["env_id"])
    if recorded:
        ceilings = {key: max(value, recorded.get(key, 0.0)) for key, value in ceilings.items()}
        source = source[:-1] + f", or the fastest in {args.results / found['folder']}."
    modes = {PRECISIONS[name].math_mode: name for name in precisions}
    for mode, name in modes.items():
        if CEILING.format(mode) not in ceilings:
            raise UsageError(f"argument --precision: {name} is no arithmetic of this {kind}")
    rates = {mode: ceilings[CEILING.format(mode)] for mode in modes}
    device = Gpu(found["facts"]["device_name"], rates, ceilings["ceiling_copy_gb_s"] / 1e3)
    return Rates(device, False, source, kind == "cpu"), precisions


def _recorded(folder: Path, env_id: str) -> dict[str, float]:
    """Returns the ceilings measured in the same environment, empty without any."""
    if not (folder / results.ENVIRONMENTS).exists():
        return {}
    facts = results.read_environments(folder).get(env_id, {})
    return {key: float(value) for key, value in facts.items() if key.startswith("ceiling_")}
