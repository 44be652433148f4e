"""Changes saved engines at random and loads them: `python engine_fuzz.py FIRST LAST FILE...` prints
a line for each change. Run in a process of its own, so that a signal is seen and ends only that.

A file that loads must answer as torch computes the graph that the file holds; and without a new
digest it must hold what it held.
"""

import contextlib
import copy
import json
import random
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels import Engine
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.saving.engine_file import _digest

_PATIENCE_S = 30
# Operations that are no part of these networks, with the text of one that is
_OTHERS = ("aten.relu.default", "aten.bernoulli.default", "aten.set_.source_Storage", "aten.system",
           "prims.convert_element_type.default", "torchvision.nms.default", "aten.tanh.default",
           "aten.as_strided.default", "aten.empty.memory_format", "")  # fmt: skip


class Saved:
    """The parts of a file."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        (self.size,) = struct.unpack("<Q", self.data[:8])
        self.header = json.loads(self.data[8 : 8 + self.size])
        self.body = self.data[8 + self.size :]
        self.told = json.loads(self.header["__metadata__"]["resfuse"])

    def write(self, path: Path, renewed: bool) -> None:
        """With the digest of what it holds now, or the old one."""
        header = copy.deepcopy(self.header)
        text = json.dumps(self.told)
        header["__metadata__"]["resfuse"] = text
        if renewed:
            header["__metadata__"]["sha256"] = _digest(text, self.tensors())
        told = json.dumps(header).encode()
        told += b" " * (-len(told) % 8)
        path.write_bytes(struct.pack("<Q", len(told)) + told + self.body)

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: torch.frombuffer(
                bytearray(self.body[slice(*entry["data_offsets"])]), dtype=_DTYPES[entry["dtype"]]
            ).view(entry["shape"])
            for name, entry in self.header.items()
            if name != "__metadata__"
        }


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32,
           "F64": torch.float64, "BOOL": torch.bool, "U8": torch.uint8}  # fmt: skip


def leaves(thing: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything is that holds nothing else."""
    items = thing.items() if isinstance(thing, dict) else enumerate(thing)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def at(thing: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        thing = thing[key]
    return thing


def other_value(rng: random.Random, value: Any, told: Any) -> Any:
    if isinstance(value, bool):
        return rng.choice([not value, None, 7])
    if isinstance(value, int):
        return rng.choice(
            [
                0,
                1,
                -1,
                value + 1,
                2 * value + 1,
                100 * value,
                10**6,
                2**31,
                2**40,
                -value - 5,
                10**30,
                float(value),
                str(value),
                True,
                max(0, value - 1),
            ]
        )
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, 1e30, 1e300, float("nan"), float("inf"), value * 2, 1, "x"])
    if isinstance(value, str):
        texts = [at(told, p) for p in leaves(told)]
        texts = [text for text in texts if isinstance(text, str) and len(text) < 80]
        return rng.choice(["", "x", value + "_", rng.choice(texts), rng.choice(_OTHERS), 3, None])
    return rng.choice([0, "x", [], {}, [[]], None, 1.5, [1, 1]])


def change_value(rng: random.Random, saved: Saved) -> None:
    """One number, name or flag of the plans."""
    path = rng.choice(list(leaves(saved.told["plans"])))
    holder = at(saved.told["plans"], path[:-1])
    holder[path[-1]] = other_value(rng, holder[path[-1]], saved.told["plans"])


def change_size(rng: random.Random, saved: Saved) -> None:
    """One number of a shape or a problem everywhere it stands, so that much fits together."""
    text = json.dumps(saved.told["plans"])
    number = rng.choice(["16", "32", "8", "2", "3", "4", "10", "64"])
    new = str(rng.choice([1, 2, 3, 5, 8, 16, 48, 64, 1024, 0]))
    for before, after in ((f" {number},", f" {new},"), (f"[{number},", f"[{new},"),
                          (f" {number}]", f" {new}]"), (f" {number}}}", f" {new}}}")):  # fmt: skip
        if rng.random() < 0.8:
            text = text.replace(before, after)
    with contextlib.suppress(ValueError):
        saved.told["plans"] = json.loads(text)


def change_structure(rng: random.Random, saved: Saved) -> None:
    """Something of the plans goes, comes twice, or changes places with its neighbour."""
    inner = [p[:i] for p in leaves(saved.told["plans"]) for i in range(1, len(p))]
    path = rng.choice(sorted(set(inner), key=str))
    holder, key = at(saved.told["plans"], path[:-1]), path[-1]
    kind = rng.randrange(3)
    if kind == 0 or not isinstance(holder, list):
        del holder[key]
    elif kind == 1:
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        other = rng.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]


def change_choice(rng: random.Random, saved: Saved) -> None:
    """How something is computed: a segment's tactic, extent or settings."""
    segment = rng.choice(rng.choice(list(saved.told["plans"].values()))["segments"])
    choice = segment["choice"]
    path = rng.choice(list(leaves(choice)))
    at(choice, path[:-1])[path[-1]] = other_value(rng, at(choice, path), saved.told["plans"])


def change_tensor(rng: random.Random, saved: Saved) -> None:
    """Another shape or dtype of the same bytes; or a name for a name."""
    names = [name for name in saved.header if name != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    entry = saved.header[a]
    kind = rng.randrange(4)
    if kind == 0:
        saved.header[a], saved.header[b] = saved.header[b], saved.header[a]
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        entry["shape"] = [1, *entry["shape"]] if rng.random() < 0.5 else [-1 + 1, *entry["shape"]]
    else:
        entry["dtype"] = rng.choice(list(_DTYPES))


def change_beside(rng: random.Random, saved: Saved) -> None:
    """What stands beside the plans."""
    path = rng.choice([p for p in leaves(saved.told) if p[0] != "plans"])
    holder = at(saved.told, path[:-1])
    if rng.random() < 0.3:
        del holder[path[-1]]
    else:
        holder[path[-1]] = other_value(rng, holder[path[-1]], saved.told)


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes of the file itself."""
    kind = rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return data + bytes(rng.randrange(1, 99))
    if kind == 2:
        start = rng.randrange(len(data))
        return data[:start] + bytes(rng.randrange(1, 64)) + data[start:]
    changed = bytearray(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.choice([1, 1, 1, 8])):
        changed[rng.randrange(header if kind == 3 else len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


CHANGES: tuple[Callable[[random.Random, Saved], None], ...] = (
    change_value, change_value, change_value, change_size, change_structure, change_choice,
    change_choice, change_tensor, change_beside,
)  # fmt: skip


def mutate(number: int, sources: list[Path], to: Path) -> tuple[str, bool]:
    """Writes change `number`; returns what it is, and whether its digest was made anew."""
    rng = random.Random(number)
    source = rng.choice(sources)
    if rng.random() < 0.15:
        to.write_bytes(damage(rng, source.read_bytes()))
        return f"{source.name} bytes", False
    saved, change = Saved(source), rng.choice(CHANGES)
    change(rng, saved)
    renewed = rng.random() < 0.8
    try:
        saved.write(to, renewed)
    except (RuntimeError, TypeError, ValueError, KeyError):  # no tensor has such a shape
        saved.write(to, False)
    return f"{source.name} {change.__name__}{' renewed' * renewed}", renewed


def by_torch(engine: Engine, x: Tensor) -> list[Tensor]:
    """What torch computes of the engine's graph, node by node."""
    built = engine._built[tuple(x.shape)]
    choices = [Candidate("eager", at, at + 1) for at in range(len(built.graph.nodes))]
    assert engine._state is not None
    return Executor(built.graph, choices, with_derived(built.graph, engine._state))(x)


def outcome(path: Path, source: Path, renewed: bool) -> str:
    """What loading and running the file comes to: WRONG is a fault."""
    try:
        engine = load_engine(path)
    except ValueError as refusal:
        return "refused" if "\n" not in str(refusal) else f"WRONG: {refusal!r}"
    if not renewed and not _same_content(path, source):
        return "WRONG: it is damaged, and loads"
    for size in engine.batch_sizes:
        value = engine._input
        x = torch.randn(size, *value.shape[1:]).to(value.dtype)
        try:
            wanted = by_torch(engine, x)
        except (RuntimeError, IndexError):
            return "torch refuses when it runs"
        got = torch.utils._pytree.tree_leaves(engine(x))
        for y, want in zip(got, wanted, strict=True):
            scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0
            close = torch.allclose(y, want, rtol=1e-3, atol=1e-4 * scale + 1e-30, equal_nan=True)
            if y.shape != want.shape or not close:
                return f"WRONG: off by {(y - want).abs().max():.3g} of {scale:.3g}"
    return "answers as torch does"


def _same_content(path: Path, source: Path) -> bool:
    a, b = Saved(path), Saved(source)
    return a.told == b.told and a.body == b.body


def main() -> None:
    first, last, *names = sys.argv[1:]
    sources = [Path(name) for name in names]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.engine"
        for number in range(int(first), int(last)):
            what, renewed = mutate(number, sources, path)
            print(f"{number} {what}", end=": ", flush=True)
            signal.alarm(_PATIENCE_S)
            source = next(s for s in sources if s.name == what.split()[0])
            print(outcome(path, source, renewed), flush=True)
            signal.alarm(0)


if __name__ == "__main__":
    main()
