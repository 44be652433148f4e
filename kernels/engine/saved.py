"""Engines on disk: one safetensors file, the weights as tensors and the plan as JSON in its header.
Nothing is unpickled. The file is written beside its place and moved there when it is whole.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resfuse.kernels.engine.environment import environment
from resfuse.kernels.engine.executor import Executor
from resfuse.kernels.engine.plan_json import (
    graph_from_json,
    graph_to_json,
    segments_from_json,
    segments_to_json,
)
from resfuse.kernels.engine.room import Laid

if TYPE_CHECKING:
    from resfuse.kernels.engine.engine import Built, Engine

SCHEMA = 1


def save(
    path: Path,
    device: torch.device,
    built: Mapping[int, "Built"],
    state: Mapping[str, Tensor],
    other_batches: str,
    cuda_graph: bool,
) -> None:
    """Writes the file; on failure there is none, or the one that was there.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    told = {
        "schema": SCHEMA,
        "device_type": device.type,
        "environment": environment(device),
        "other_batches": other_batches,
        "cuda_graph": cuda_graph,
        "plans": {
            str(size): {"graph": graph_to_json(b.graph), "segments": segments_to_json(b.segments)}
            for size, b in built.items()
        },
    }
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, name, metadata={"resfuse": json.dumps(told)})
        Path(name).replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def load_engine(path: str | Path) -> "Engine":
    """The engine that was saved, on the device it was planned for; nothing is measured.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no engine, damaged, of another schema, or of another device or software.
    """
    from safetensors import SafetensorError, safe_open

    from resfuse.kernels.engine.engine import Built, Engine

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"argument path: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["resfuse"])
            if not isinstance(told, dict):
                raise ValueError("no plan in its header")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"argument path: {path} is no engine, or a damaged one: {error}") from None
    try:
        device = _same_device(path, told)
        state = {name: tensor.to(device) for name, tensor in state.items()}
        plans = {
            int(size): (graph_from_json(p["graph"]), segments_from_json(p["segments"]))
            for size, p in told["plans"].items()
        }
        laid = Laid()
        built = {
            size: Built(graph, segs, Executor(graph, [s.choice for s in segs], state, laid))
            for size, (graph, segs) in plans.items()
        }
        return Engine(
            built,
            state,
            other_batches=told["other_batches"],
            cuda_graph=told.get("cuda_graph", False),
        )
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"argument path: {path} holds no plan that can be run: {error}") from None


def _same_device(path: Path, told: dict[str, Any]) -> torch.device:
    if told.get("schema") != SCHEMA:
        raise ValueError(
            f"argument path: {path} has schema {told.get('schema')}; this version reads {SCHEMA}"
        )
    if told["device_type"] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"argument path: {path} was built on a GPU; there is none here")
    device = torch.device(told["device_type"])
    here = environment(device)
    for fact, there in told["environment"].items():
        if here.get(fact) != there:
            raise ValueError(
                f"argument path: {path} was built with {fact} {there}; here it is "
                f"{here.get(fact)}. Build it again here"
            )
    return device
