"""Engines on disk: one safetensors file, the weights as tensors and the plan as JSON in its header.
It is written under a temporary name and renamed when it is complete.

A file may come from a stranger. Nothing is unpickled; a digest finds damage; everything that
follows from the graph is inferred again and compared (plan_check.py), so that no number in it
reaches memory that is not there; and only operations known to do nothing but compute are run.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.cpu.cpus import asking, require_threads
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.runtime.own_weights import require_usable
from resfuse.kernels.engine.saving.plan_check import checked_plans
from resfuse.kernels.engine.saving.plan_json import (
    graph_from_json,
    graph_to_json,
    segments_from_json,
    segments_to_json,
)
from resfuse.kernels.tuning_cache.environment import environment

Plans = Mapping[tuple[int, ...], tuple[Graph, tuple[Segment, ...]]]  # by the input's shape

# 1: no digest, 2: plans by batch size, 3: no conversions, 4: no layer norms, 5: no int8, 6: nothing
# derived
SCHEMA = 7
_MOST_PLAN = 64 << 20  # bytes of JSON: ResNet-152's has 0.3 million


@dataclass(frozen=True)
class Saved:
    """The contents of an engine file, checked, with tensors on the device they are for."""

    plans: Plans
    state: Mapping[str, Tensor]
    other_batches: Any  # one of build_engine's values
    other_shapes: Any  # likewise
    cuda_graph: bool
    threads: int | None


def save(
    path: Path,
    device: torch.device,
    plans: Plans,
    state: Mapping[str, Tensor],
    other_batches: str,
    other_shapes: str,
    cuda_graph: bool,
    threads: int | None = None,
) -> None:
    """Writes the file; on failure an earlier file stays as it was.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {
        "schema": SCHEMA,
        "device_type": device.type,
        "environment": _environment(device, threads),
        "threads": threads,
        "other_batches": other_batches,
        "other_shapes": other_shapes,
        "cuda_graph": cuda_graph,
        "plans": {
            _key(shape): {"graph": graph_to_json(graph), "segments": segments_to_json(segments)}
            for shape, (graph, segments) in plans.items()
        },
    }
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        text = json.dumps(header)
        save_file(tensors, name, metadata={"resfuse": text, "sha256": _digest(text, tensors)})
        Path(name).replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def read(path: Path, allow: Collection[str]) -> Saved:
    """Returns the contents of a file; arguments and errors are those of load_engine (load.py)."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"argument path: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata["resfuse"]
            if len(text) > _MOST_PLAN:
                raise ValueError(f"a plan of {len(text)} bytes")
            header = json.loads(text)
            if not isinstance(header, dict):
                raise ValueError("no plan in its header")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"argument path: {path} is no engine, or a damaged one: {error}") from None
    try:
        device = _same_device(path, header)
        if metadata.get("sha256") != _digest(text, state):
            raise _Damaged(
                f"argument path: {path} is damaged: its digest is that of something else"
            )
        return _saved(header, {n: tensor.to(device) for n, tensor in state.items()}, device, allow)
    except _Damaged as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a plan that is not trusted may lead to any error
        raise cannot_run(path, error) from error


def cannot_run(path: Path, error: Exception) -> ValueError:
    """Returns the error to raise where a plan read from a file has led to `error`."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"argument path: {path} holds no plan that can be run: {said}")


class _Damaged(ValueError):
    """An error whose message names the argument already."""


def _saved(
    header: dict[str, Any], state: dict[str, Tensor], device: torch.device, allow: Collection[str]
) -> Saved:
    plans = checked_plans(
        {
            tuple(map(int, key.split("x"))): (
                replace(graph_from_json(p["graph"]), device=device),
                segments_from_json(p["segments"]),
            )
            for key, p in header["plans"].items()
        },
        state,
        device,
        allow,
    )
    constants = {name for graph, _ in plans.values() for name in graph.constants}
    require_usable([graph for graph, _ in plans.values()], state, constants, "path")
    if header["other_batches"] not in ("error", "pad", "eager"):
        raise ValueError(f"other batches: {header['other_batches']!r}")
    if header["other_shapes"] not in ("error", "build"):
        raise ValueError(f"other shapes: {header['other_shapes']!r}")
    if type(header["cuda_graph"]) is not bool:
        raise ValueError(f"CUDA graphs: {header['cuda_graph']!r}")
    return Saved(
        plans, state, header["other_batches"], header["other_shapes"], header["cuda_graph"],
        header.get("threads"),
    )  # fmt: skip


def _key(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _environment(device: torch.device, threads: int | None) -> dict[str, str]:
    """Returns the environment of an engine that runs on `threads` threads."""
    require_threads(threads)
    with asking(threads):
        return environment(device)


def _digest(plan: str, state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the plan and of each tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(plan.encode())
    for name, tensor in sorted(state.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _same_device(path: Path, header: dict[str, Any]) -> torch.device:
    if header.get("schema") != SCHEMA:
        raise _Damaged(
            f"argument path: {path} has schema {header.get('schema')}; this version reads "
            f"{SCHEMA}. Build it again here"
        )
    if header["device_type"] not in ("cpu", "cuda"):
        raise ValueError(f"a device {header['device_type']!r}")
    if header["device_type"] == "cuda" and not torch.cuda.is_available():
        raise _Damaged(f"argument path: {path} was built on a GPU; there is none here")
    device = torch.device(header["device_type"])
    here = _environment(device, header.get("threads"))
    for fact in {**header["environment"], **here}:
        there = header["environment"].get(fact)
        if here.get(fact) != there:
            raise _Damaged(
                f"argument path: {path} was built with {fact} {there}; here it is "
                f"{here.get(fact)}. Build it again here"
            )
    return device
