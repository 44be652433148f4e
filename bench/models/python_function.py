"""`PATH.py:function` or `package.module:function`: whatever module a function of yours returns.

The file is run, in the process that measures and in the one that asks, as Python runs it: by its
own folder's imports and with its own side effects.
"""

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from resfuse.bench.common.errors import UsageError
from resfuse.bench.models.source import Arguments, Shape, Source, file_origin, first_line


def names(where: str) -> Sequence[str]:
    """The functions that a file or module defines, as models are named; nothing is run."""
    file = _file(where)
    try:
        tree = ast.parse(file.read_text(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as Python: {first_line(error)}") from None
    return [
        f"{where}:{node.name}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def input_shape(name: str, arguments: Arguments) -> Shape | None:
    """What the model says of itself, in timm's way (`pretrained_cfg["input_size"]`) or Lightning's
    (`example_input_array`)."""
    return shape_told_by(build(name, arguments))


def shape_told_by(model: nn.Module) -> Shape | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if isinstance(size, tuple | list) and len(size) == 3:
        return int(size[0]), int(size[1]), int(size[2])
    example = getattr(model, "example_input_array", None)
    if isinstance(example, Tensor) and example.dim() == 4:
        channels, height, width = example.shape[1:]
        return channels, height, width
    return None


def build(name: str, arguments: Arguments) -> nn.Module:
    """Calls the function.

    Raises:
        UsageError: there is none, it or its file raises, or what it returns is no module.
    """
    function = _function(name)
    try:
        made = function(**arguments)
    except Exception as error:
        given = f" of {dict(arguments)}" if arguments else ""
        raise UsageError(f"{name}{given} raised {first_line(error)}") from error
    except SystemExit as end:
        raise UsageError(f"{name} ended the process (SystemExit: {end})") from None
    if not isinstance(made, nn.Module):
        raise UsageError(f"{name} returned a {type(made).__name__}, no torch.nn.Module")
    return made


def origin(name: str) -> str:
    return file_origin(_file(name.rpartition(":")[0]))


def _function(name: str) -> Callable[..., Any]:
    where, _, wanted = name.rpartition(":")
    module = _module(where)
    found = getattr(module, wanted, None)
    if callable(found):
        function: Callable[..., Any] = found
        return function
    near = get_close_matches(f"{where}:{wanted}", names(where), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    said = "is no function" if found is not None else "is not there"
    raise UsageError(f"{name} {said}{hint}")


def _module(where: str) -> ModuleType:
    """The module of a file or a name, run once in a process."""
    file = _file(where)
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        name = f"resfuse_model_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickling look it up
        folder = str(file.resolve().parent)
        sys.path.insert(0, folder)  # as for `python PATH.py`
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(folder)
        return module
    except Exception as error:
        raise UsageError(f"{where} raised {first_line(error)} while it was imported") from error
    except SystemExit as end:
        raise UsageError(f"{where} ended the process (SystemExit: {end})") from None


def _file(where: str) -> Path:
    """The file of a path or of a module's name; nothing is run but the packages around it."""
    if where.endswith(".py"):
        file = Path(where)
        if not file.is_file():
            raise UsageError(f"there is no file {where}")
        return file
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; a console script does not
    try:
        spec = importlib.util.find_spec(where)
    except Exception as error:
        raise UsageError(f"{where} raised {first_line(error)} while it was looked for") from error
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UsageError(f"there is no Python module {where}")
    return Path(spec.origin)


SOURCE = Source(
    "what a function of a Python file or module returns",
    names,
    input_shape,
    build,
    origin,
    weights="own",
)
