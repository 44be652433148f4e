"""Defines TACTICS, all ways to compute a segment of a graph; each is a module of its own.

A tactic's module has
- `refusal(device, dtype) -> str | None`: the reason why the tactic cannot run there, in one
  sentence;
- `segments(graph, at) -> Iterable[Candidate]`: its candidates for runs of nodes from `at` on;
- `scratch(graph, candidate) -> int`: the bytes of scratch memory that a candidate needs (tactics in
  the arena only);
- `lower(graph, candidate, state, arena) -> Lowered`: a candidate made ready to run;
- `kernels(graph, candidate) -> list[Graph]`, optional: the parts that a segment's kernels compute,
  where there are several;
- `configuration(graph, candidate) -> Key`, optional: the key under which a Triton kernel's
  configuration is on the denylist (resfuse/kernels/tuning_cache/denylist.py).

Tactics on a GPU pass values on as torch's tensors, [N, C, H, W] in channels_last.
"""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.ir.lowered import Lowered
from resfuse.kernels.engine.memory.buffers import Arena


class TacticModule(Protocol):
    """The interface of a tactic's module."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None: ...

    def segments(self, graph: Graph, at: int) -> Iterable[Candidate]: ...

    def scratch(self, graph: Graph, candidate: Candidate) -> int: ...

    def lower(self, graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Lowered: ...


@dataclass(frozen=True)
class Tactic:
    """The module of a tactic and what it does."""

    module: str
    does: str
    in_arena: bool = False  # reads and writes values at fixed addresses
    devices: tuple[str, ...] | None = None  # types that plans may use it on; None: its module says

    def load(self) -> TacticModule:
        return cast(TacticModule, importlib.import_module(self.module))


TACTICS: dict[str, Tactic] = {
    "native": Tactic(
        "resfuse.kernels.engine.tactics.cpu.native",
        "C++ for this processor: direct, Winograd and grouped convolutions, pools; fp32, bf16; CPU",
        in_arena=True,
    ),
    "native_chain": Tactic(
        "resfuse.kernels.engine.tactics.cpu.native_chain",
        "3x3, 1x1 + residual and the next block's 1x1 in C++, block by block of pixels",
        in_arena=True,
        devices=("cpu",),
    ),
    "native_strips": Tactic(
        "resfuse.kernels.engine.tactics.cpu.native_rows",
        "convolution and the max-pool or 3x3 behind it in C++, strip by strip of rows",
        in_arena=True,
        devices=("cpu",),
    ),
    "native_chunks": Tactic(
        "resfuse.kernels.engine.tactics.cpu.native_chunks",
        "early stages in C++, a few images at a time",
        in_arena=True,
        devices=("cpu",),
    ),
    "onednn": Tactic(
        "resfuse.kernels.engine.tactics.cpu.onednn_conv",
        "oneDNN's fused convolutions, packed weights; CPU",
    ),
    "cudnn": Tactic(
        "resfuse.kernels.engine.tactics.gpu.cudnn_conv",
        "cuDNN's convolution + bias + sum + ReLU",
        devices=("cuda",),
    ),
    "triton_conv": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_conv",
        "any convolution as an implicit GEMM, and depthwise",
        devices=("cuda",),
    ),
    "triton_conv1x1": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_conv1x1",
        "1x1 convolution as one GEMM",
        devices=("cuda",),
    ),
    "split_k": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_split_k",
        "convolution for small batches, the reduction split",
        devices=("cuda",),
    ),
    "projection": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_projection",
        "1x1 convolution with the block's projection shortcut folded in",
        devices=("cuda",),
    ),
    "int8": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_int8",
        "any convolution of quantised values, requantised, in int8",
        devices=("cuda",),
    ),
    "int8_maps": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_int8_maps",
        "conversions, pools and means of quantised values",
        devices=("cuda",),
    ),
    "stem": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_stem",
        "7x7/2 convolution, ReLU and max-pool",
        devices=("cuda",),
    ),
    "block_tail": Tactic(
        "resfuse.kernels.engine.tactics.gpu.triton_block_tail",
        "3x3, 1x1 + residual + ReLU, and the next block's 1x1",
        devices=("cuda",),
    ),
    "chunks": Tactic(
        "resfuse.kernels.engine.tactics.gpu.torch_chunks",
        "early stages, a few images at a time",
        devices=("cuda",),
    ),
    "eager": Tactic("resfuse.kernels.engine.tactics.eager", "torch's own operations, one by one"),
}


def tactics_on(device: torch.device, dtype: torch.dtype) -> dict[str, TacticModule]:
    """Returns the tactics, by name, that are meant for a device and can run on it.

    GPU tactics are left out on a CPU, though Triton's interpreter can run them there for tests.
    """
    loaded = tactics_for(device.type)
    return {name: m for name, m in loaded.items() if m.refusal(device, dtype) is None}


def tactics_for(device_type: str) -> dict[str, TacticModule]:
    """Returns the tactics, by name, that are meant for a type of device, present or not."""
    return {
        name: tactic.load()
        for name, tactic in TACTICS.items()
        if tactic.devices is None or device_type in tactic.devices
    }
