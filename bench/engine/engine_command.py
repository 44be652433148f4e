"""`resfuse engine MODEL`: build an engine, explain it, check it, time it; save or load it."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from resfuse.bench.common.errors import Unavailable, UsageError
from resfuse.bench.common.output_file import require_place
from resfuse.bench.common.precision import set_math_mode
from resfuse.bench.engine.engine_facts import FORMAT, EngineFacts, Speed, build, facts
from resfuse.bench.measuring import network
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.device import resolve_device
from resfuse.bench.models.model_builder import describe as describe_model
from resfuse.bench.models.sources import choose_one
from resfuse.bench.records.case import Case, Options
from resfuse.bench.records.precision_names import pick_precision
from resfuse.bench.running.sweep import require_positive
from resfuse.kernels import Engine, load_engine


def engine(args: argparse.Namespace) -> int:
    """Prints what an engine is like; returns 1 if it gives wrong answers."""
    case = case_of(args)
    for flag in ("save", "json"):
        require_place(f"--{flag}", getattr(args, flag))
    if args.timings is not None and args.timings.exists() and not args.timings.is_dir():
        raise UsageError(f"argument --timings: {args.timings} is not a folder")
    try:
        made, how, found = describe(
            case, args.batch_size, options_of(args), args.timings, args.load
        )
        if args.save is not None:
            made.save(args.save)
            how.append(f"Saved in {args.save}, {args.save.stat().st_size / 2**20:.1f} MB.")
    except UsageError:
        raise
    except (ValueError, OSError, Unavailable) as error:
        raise UsageError(str(error)) from error
    print(text(case, how, found))
    if args.json is not None:
        batches = [asdict(one) for one in found]
        told = {**case.identity(), "device": case.device, "built": how, "batches": batches}
        args.json.write_text(json.dumps(told, indent=2) + "\n")
    return int(any(one.error for one in found))


def case_of(args: argparse.Namespace) -> Case:
    """The case of the parsed flags, at batch 1, or the only one that the model takes.

    Raises:
        UsageError: an unknown name, a size below 1, or a device that cannot be used.
    """
    model = choose_one("MODEL", args.model, args.model_kwargs)
    precision = pick_precision(args.precision)
    require_positive("--batch-size", args.batch_size)
    if args.img_size is not None:
        require_positive("--img-size", [args.img_size])
    of = describe_model(model, args.weights, args.input_shape, args.img_size)
    device = resolve_device(args.device)
    batch_size = of.batch_size or 1
    return Case(
        of.name, "engine", "inference", device, precision, FORMAT, batch_size, of.height, "eager",
        FORMAT, of.weights, channels=of.channels, img_width=of.img_width, origin=of.origin,
    )  # fmt: skip


def options_of(args: argparse.Namespace) -> Options:
    return Options(seconds=args.time, seed=args.seed)


def describe(
    case: Case,
    batch_sizes: Sequence[int],
    options: Options,
    timings: Path | None = None,
    file: Path | None = None,
) -> tuple[Engine, list[str], list[EngineFacts]]:
    """Builds (or loads from `file`) an engine of the case's network and examines it.

    Args:
        batch_sizes: none stand for 1, or for those of the file.
        timings: the folder of the timing cache; the user's own by default.

    Returns:
        the engine, sentences on how it came about, and the facts of each batch size.

    Raises:
        ValueError, OSError: as build_engine and load_engine.
        Unavailable: the device cannot compute in that precision.
    """
    set_math_mode(case.math_mode, case.device.split(":")[0])
    model = network.master(case, options.seed)
    if file is None:
        made, how = _build(model, case, batch_sizes or [case.batch_size], timings)
    else:
        made, how = _load(file, batch_sizes)
    sizes = sorted(set(batch_sizes)) or made.batch_sizes
    return made, how, [facts(made, model, replace(case, batch_size=n), options) for n in sizes]


def _build(
    model: nn.Module, case: Case, batch_sizes: Sequence[int], timings: Path | None
) -> tuple[Engine, list[str]]:
    made, first_s = build(model, case, batch_sizes, timings)
    _, again_s = build(model, case, batch_sizes, timings)
    where = timings or "the user's cache"
    again = f"a second build took {again_s:.1f} s, with the times kept in {where}"
    return made, [f"Built in {first_s:.1f} s; {again}."]


def _load(file: Path, batch_sizes: Sequence[int]) -> tuple[Engine, list[str]]:
    watch = timing.Watch()
    made = load_engine(file)
    loaded_s = timing.seconds(watch.elapsed())
    for size in batch_sizes:
        if size not in made.batch_sizes:
            has = ", ".join(map(str, made.batch_sizes))
            raise UsageError(f"argument --batch-size: {size}; {file} holds {has}")
    return made, [f"Loaded from {file} in {loaded_s:.1f} s."]


def text(case: Case, how: Sequence[str], found: Sequence[EngineFacts]) -> str:
    """All there is to read about an engine, a section for each batch size."""
    title = f"{case.model}, {case.precision}, {case.size_text()}, {case.device}"
    parts = [f"{title}. {' '.join(how)}"]
    parts += [f"Batch {one.batch_size}\n\n{one.explain}\n\n{summary(one)}" for one in found]
    return "\n\n".join(parts)


def summary(one: EngineFacts) -> str:
    """Memory, error and speed of one batch size."""
    graphs = f", {one.graphs_mb:.1f} MB for CUDA graphs of all batches" if one.graphs_mb else ""
    lines = [
        f"Memory: {one.arena_mb:.1f} MB between layers (at least {one.least_mb:.1f} MB), "
        f"{one.weights_mb:.1f} MB of weights{graphs}.",
        f"Error against fp64: {_number(one.rel_l2_err)} relative, worst image "
        f"(eager {one.eager_err:.2g}, allowed {one.allowed_err:.2g}); "
        f"{_number(one.max_abs_err)} at the most.",
        _speed(one.speed) if one.speed else f"Wrong, and so not timed: {one.error}.",
    ]
    return "\n".join(lines)


def _speed(speed: Speed) -> str:
    noise = "" if speed.quiet else " Other processes were running."
    return (
        f"Time: {speed.p50_ms:.3f} ms, eager {FORMAT} {speed.eager_p50_ms:.3f} ms (medians of "
        f"{speed.rounds} rounds in turns): {speed.speedup:.2f}x "
        f"[{speed.speedup_ci_low:.2f}, {speed.speedup_ci_high:.2f}].{noise}"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
