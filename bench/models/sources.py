"""SOURCES and FILES: everywhere a model can come from; a new source is a file here and a line.

A source is imported when it is used, so that an optional package that is not installed costs
nothing. Every model is built from its name and a seed alone, in whichever process needs it.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick, unknown
from resfuse.bench.models.model_name import ModelName, parse
from resfuse.bench.models.source import Source, shape_text

OURS = "resfuse"  # its names need no prefix
# What stands before the colon -> where the source is, and the package that it needs.
SOURCES: dict[str, tuple[str, str]] = {
    OURS: ("resfuse.bench.models.zoo:SOURCE", ""),
    "torchvision": ("resfuse.bench.models.torchvision_models:SOURCE", "torchvision"),
    "timm": ("resfuse.bench.models.timm_models:SOURCE", "timm"),
    "smp": ("resfuse.bench.models.smp_models:SOURCE", "segmentation_models_pytorch"),
}
# Suffix of a file that models come from -> its source. A module has functions, too.
FUNCTIONS = "resfuse.bench.models.python_function:SOURCE"
FILES: dict[str, str] = {
    ".py": FUNCTIONS,
    ".pt2": "resfuse.bench.models.exported_program:SOURCE",
    ".onnx": "resfuse.bench.models.onnx_file:SOURCE",
}
FORMS = (
    "a name of `resfuse list models`, torchvision:NAME, timm:NAME, smp:NAME, PATH.py:FUNCTION, "
    "package.module:FUNCTION, PATH.pt2, PATH.onnx"
)


def source_of(text: str, argument: str = "--model") -> tuple[Source, str, str]:
    """The source of a model, its prefix ("" for files and modules), and the name there.

    Raises:
        UsageError: there is no such source, or its package is not installed.
    """
    where, colon, name = text.partition(":")
    if not colon and not _suffix(text):
        return _load(OURS, argument), OURS, text
    if where in SOURCES:
        return _load(where, argument), where, name
    # The last colon: a path may have others before the function's.
    where = text.rpartition(":")[0] if colon else text
    suffix = _suffix(where)
    target = FILES.get(suffix)
    if suffix == ".py" and not colon:
        raise UsageError(f"argument {argument}: {text} names no function; accepted: {text}:NAME")
    if target is not None:
        return _import(target), "", text
    if _is_module(where):
        return _import(FUNCTIONS), "", text
    near = get_close_matches(where, SOURCES, n=2)
    hint = f"did you mean {' or '.join(f'{one}:' for one in near)}? " if near else ""
    raise UsageError(f"argument {argument}: unknown source '{where}'; {hint}accepted: {FORMS}")


def choose(argument: str, patterns: Sequence[str], kwargs: Sequence[str] = ()) -> list[str]:
    """The models that names and wildcards stand for, each once, in the order they were given; our
    own networks in the registry's order where there are no others.

    Args:
        kwargs: `key=value`, for every model.

    Raises:
        UsageError: an unknown source or name (near ones are offered), or bad arguments.
    """
    chosen: dict[str, ModelName] = {}
    for pattern in patterns:
        given = parse(pattern, argument, kwargs)
        for text in _matching(argument, given.text):
            one = replace(given, text=text)
            chosen[str(one)] = one
    own = {name: at for at, name in enumerate(_load(OURS, argument).names(""))}
    if all(one.text in own for one in chosen.values()):
        return sorted(chosen, key=lambda name: own[chosen[name].text])
    return list(chosen)


def choose_one(argument: str, pattern: str, kwargs: Sequence[str] = ()) -> str:
    """The one model that a name stands for; raises UsageError for none, or several."""
    found = choose(argument, [pattern], kwargs)
    if len(found) > 1:
        raise UsageError(
            f"argument {argument}: '{pattern}' stands for {len(found)} names; give one"
        )
    return found[0]


def matching(source: str, patterns: Sequence[str], argument: str = "--source") -> list[str]:
    """The models of a source that match any of the patterns, as `--model` takes them.

    Args:
        source: a name in SOURCES, or a file or module with models in it.

    Raises:
        UsageError: an unknown source, or a pattern that matches nothing.
    """
    if source in SOURCES:
        _load(source, argument)
        found = [name for p in patterns for name in _matching("NAME", f"{source}:{p}")]
        return list(dict.fromkeys(found))
    target = FILES.get(_suffix(source)) or (FUNCTIONS if _is_module(source) else None)
    if target is None:
        near = get_close_matches(source, SOURCES, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        files = ", ".join(f"PATH{known}" for known in FILES)
        raise UsageError(
            f"argument {argument}: unknown source '{source}'; {hint}"
            f"accepted: {', '.join(SOURCES)}, {files}, package.module"
        )
    try:
        known = {name.removeprefix(f"{source}:"): name for name in _import(target).names(source)}
    except UsageError as error:
        raise UsageError(f"argument {argument}: {error}") from None
    return [known[name] for name in pick("NAME", patterns, list(known))]


def shown_shape(model: str) -> str:
    """The image a model takes, as a list shows it; a function is not run for that."""
    source, name, given = parsed(model)
    if source is _import(FUNCTIONS):
        return "see --input-shape"
    shape = source.input_shape(name, given.arguments())
    return shape_text(*shape) if shape else "see --input-shape"


def parsed(model: str) -> tuple[Source, str, ModelName]:
    """A chosen model's source, its name there, and its name with arguments."""
    given = parse(model)
    source, _, name = source_of(given.text)
    return source, name, given


def is_ours(model: str) -> bool:
    return source_of(parse(model).text)[1] == OURS


def _matching(argument: str, text: str) -> list[str]:
    source, prefix, name = source_of(text, argument)
    if not prefix:  # a file's names are known once it has run
        return [text]
    shown_by = "resfuse list models" + (f" --source {prefix}" if prefix != OURS else "")
    known = source.names("")
    dotted = "." in name  # timm's tags: with none asked for, none is meant
    found = [one for one in known if fnmatchcase(one, name) and (dotted or "." not in one)]
    if not found:
        raise unknown(argument, name, known, shown_by)
    return [one if prefix == OURS else f"{prefix}:{one}" for one in dict.fromkeys(found)]


def _suffix(text: str) -> str:
    suffix = PurePath(text.rpartition(":")[0] or text).suffix
    return suffix if suffix in FILES else ""


def _is_module(where: str) -> bool:
    """Whether it is spelt like a module, and its top-level package is here."""
    parts = where.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    if Path(parts[0]).is_dir() or Path(f"{parts[0]}.py").is_file():
        return True
    try:
        return importlib.util.find_spec(parts[0]) is not None
    except (ImportError, ValueError):  # the latter of __main__
        return False


def _load(name: str, argument: str) -> Source:
    target, package = SOURCES[name]
    if package and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"argument {argument}: {name}: needs the package {package}, which is not installed"
        )
    return _import(target)


def _import(target: str) -> Source:
    module, name = target.split(":")
    source: Source = getattr(importlib.import_module(module), name)
    return source
