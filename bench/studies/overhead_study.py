"""Does the harness slow down what it measures? Its timed step against a bare loop.

Blocks of both take turns, in one process, on the same model and input; the ratio is taken block by
block. The result is appended to harness.csv in the results folder of this environment.
"""

import argparse
import time
from statistics import median

import torch

from resfuse.bench.common.statistics import paired_speedup
from resfuse.bench.measuring import network
from resfuse.bench.measuring.clock.timing import interleave
from resfuse.bench.measuring.device import resolve_device
from resfuse.bench.measuring.inference import Inference, answers
from resfuse.bench.measuring.probes import machine
from resfuse.bench.records import results
from resfuse.bench.records.case import Case
from resfuse.bench.records.sample import Value
from resfuse.bench.studies.harness_sheet import HARNESS, append

BLOCKS = 25
STEPS = 4  # a block
MODELS = ("resnet18", "resnet50")


def run(args: argparse.Namespace) -> int:
    """Runs `resfuse study overhead`: times every model of MODELS at batch 1 and prints a line for
    each."""
    device = resolve_device(args.device)
    home = args.results / machine.folder_name(machine.facts(device, 0))
    results.check_writable(home, HARNESS)
    rows = [_measure(model, device) for model in MODELS]
    path = append(args.results, device, rows)
    for row in rows:
        print(
            f"{row['model']}: {row['bare_samples_per_sec']:.1f} images/s in a bare loop, "
            f"harness / bare {row['ratio']:.3f} "
            f"[{row['ratio_ci_low']:.3f}, {row['ratio_ci_high']:.3f}]"
        )
    print(f"appended to {path}")
    return 0


def _measure(name: str, device: str) -> dict[str, Value]:
    case = Case(name, "eager", "inference", device, "float32", "contiguous", 1, 224)
    model, batches = network.master(case, 0), network.batches(case)
    subject = Inference("eager", "contiguous", model, batches)
    subject.set_up()
    subject.expect(answers(model, batches, case.math_mode))
    bare: list[float] = []
    harness: list[float] = []
    for _ in range(BLOCKS):
        bare.append(_bare_loop(model, batches[0]))
        laps, _ = interleave([subject.timed()], torch.device(device).type, 0, STEPS, STEPS)
        harness.append(median(sum(lap) for lap in laps[0]))
    ratio, low, high = paired_speedup(bare, harness)
    return {
        "study": "overhead",
        "model": name,
        "batch_size": case.batch_size,
        "blocks": BLOCKS,
        "bare_samples_per_sec": 1e3 / median(bare),
        "harness_samples_per_sec": 1e3 / median(harness),
        "ratio": ratio,
        "ratio_ci_low": low,
        "ratio_ci_high": high,
    }


@torch.inference_mode()
def _bare_loop(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Times a plain loop: warm up, loop, clock. Returns the median milliseconds of a step.

    It reads the clock itself on purpose: it stands for code that knows nothing of timing.py.
    """
    times = []
    for i in range(3 + STEPS):
        start = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        if i >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    return median(times)
