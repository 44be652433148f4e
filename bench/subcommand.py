"""A command as a row of a table: what runs it, its flags, and a line of help."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Subcommand:
    run: str  # "module:function", imported when used: takes the parsed flags, returns the exit code
    add_flags: Callable[[argparse.ArgumentParser], None]
    does: str  # for --help

    def load(self) -> Callable[[argparse.Namespace], int]:
        module, function = self.run.split(":")
        command: Callable[[argparse.Namespace], int]
        command = getattr(importlib.import_module(module), function)
        return command
