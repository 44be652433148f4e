"""`PATH.pt2`: a program that torch.export.save wrote.

Like a Python file it is code: torch evaluates the guards and shapes in it. Nothing in it is
unpickled but tensors.
"""

import contextlib
import importlib
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.source import Arguments, Shape, Source, file_origin, first_line

QUANTIZED = "quantized_decomposed."  # operations of torch's that are registered by an import


def names(where: str) -> Sequence[str]:
    return [where] if Path(where).is_file() else []


def input_shape(name: str, arguments: Arguments) -> Shape:
    _, channels, height, width = _example(name).shape
    return channels, height, width


def batch_size(name: str, arguments: Arguments) -> int | None:
    """The batch it was exported for; None where that was left free."""
    dynamic = _batch(_program(name))
    return dynamic if isinstance(dynamic, int) else None


def build(name: str, arguments: Arguments) -> nn.Module:
    """The program as a module: its own weights, no matter how torch's generator is seeded.

    Raises:
        UsageError: the file cannot be read, takes something other than one batch of images, is
            quantised, or was given arguments.
    """
    if arguments:
        raise UsageError(f"{name} is an exported program and takes no arguments")
    _example(name)
    if any(str(node.target).startswith(QUANTIZED) for node in _program(name).graph.nodes):
        raise UsageError(
            f"{name} is a program that PT2E has quantised, of which torch computes nothing in fp64 "
            "to compare with; build_engine takes it in Python, and --precision int8 quantises "
            "programs in fp32"
        )
    module = _program(name).module()
    # A plain graph module: export's own refuses eval(), and checks what the harness checks.
    graph = fx.GraphModule(module, module.graph)
    for node in list(graph.graph.nodes):
        checks = node.op == "call_module" and node.target == "_guards_fn"
        if checks or node.target == torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.eval()


def origin(name: str) -> str:
    return file_origin(Path(name))


def _example(name: str) -> Tensor:
    """The images it was exported with, as far as their shape is concerned."""
    program = _program(name)
    values = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
        told = ", ".join(str(list(v.shape)) if isinstance(v, Tensor) else "?" for v in values)
        raise UsageError(f"{name} takes {told or 'nothing'}; accepted: one batch of images")
    image: Tensor = values[0]
    if not all(isinstance(size, int) for size in image.shape[1:]):
        example = program.example_inputs
        given = [t for t in tree_leaves(example) if isinstance(t, Tensor)]
        if not given:
            raise UsageError(f"{name} leaves its image size open; say it by --input-shape C,H,W")
        return given[0]
    if not image.dtype.is_floating_point:
        raise UsageError(f"{name} takes {image.dtype}; accepted: floating-point images")
    return image


def _batch(program: ExportedProgram) -> Any:
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            return node.meta["val"].shape[0]
    return None


@cache
def _program(name: str) -> ExportedProgram:
    file = Path(name)
    if not file.is_file():
        raise UsageError(f"there is no file {name}")
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers QUANTIZED
    try:
        with _quiet(), _tensors_alone():
            return torch.export.load(file)
    except Exception as error:
        version = _version(file)
        of = f", written by torch {version}," if version else ""
        raise UsageError(
            f"{name}{of} cannot be read by torch {torch.__version__} as an exported program: "
            f"{first_line(error)}"
        ) from error


def _version(file: Path) -> str:
    """The torch that wrote an archive, as far as it says so."""
    try:
        with zipfile.ZipFile(file) as archive:
            entry = next(n for n in archive.namelist() if n.endswith("models/model.json"))
            return str(json.loads(archive.read(entry)).get("torch_version", ""))
    except Exception:
        return ""


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """torch.export.load falls back to unpickling whatever it finds; here it finds a refusal."""
    load = torch.load

    def tensors(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "weights_only": True})

    torch.load = tensors
    package = _package()
    unpickles = package.pickle
    package.pickle = _Refusing(unpickles)
    try:
        yield
    finally:
        torch.load, package.pickle = load, unpickles


def _package() -> Any:
    from torch.export.pt2_archive import _package

    return _package


class _Refusing:
    """The pickle module without a way to read."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name in ("loads", "load", "Unpickler"):
            raise ValueError("it holds a pickled Python object, which reading would execute")
        return getattr(self._module, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It logs a traceback before it raises."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


SOURCE = Source(
    "a program that torch.export.save wrote",
    names,
    input_shape,
    build,
    origin,
    weights="own",
    batch_size=batch_size,
)
