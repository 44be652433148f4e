"""A command as a row of a table: what runs it, its flags, and a line of help."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

AddFlags = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Subcommand:
    run: str  # "module:function", imported when used: takes the parsed flags, returns the exit code
    add_flags: AddFlags | str  # or "module:function", for what is a tool beside the product
    does: str  # for --help

    def load(self) -> Callable[[argparse.Namespace], int]:
        command: Callable[[argparse.Namespace], int] = _load(self.run)
        return command

    def flags(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's flags to its parser."""
        add = _load(self.add_flags) if isinstance(self.add_flags, str) else self.add_flags
        add(parser)


def _load(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)
