"""Exports of one module that are made once for a file of tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.engine.frontend import export
from resfuse.kernels.engine.frontend.layout_questions import LayoutQuestions

Exported = tuple[torch.export.ExportedProgram, fx.Graph]


@contextmanager
def keeping_exports() -> Iterator[None]:
    """A module is exported once for each shape, in each mode of torch's: two thirds of the seconds
    that a build of a small engine takes. For files whose modules only ever change the values of
    their parameters; of an equal module, or a copy of one, nothing is kept.
    """
    exported, kept = export._exported, {}

    def once(model: nn.Module, example: Tensor, questions: LayoutQuestions) -> Exported:
        key = id(model), *_facts(example)
        if key not in kept:
            found = exported(model, example, questions)
            kept[key] = model, found, questions.asked, questions.offset
        _, found, questions.asked, questions.offset = kept[key]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_exported", once)
        yield


def _facts(example: Tensor) -> tuple[Any, ...]:
    lies = example.shape, example.stride(), example.storage_offset()
    kind = example.dtype, example.device, example.is_inference(), example.requires_grad
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()
    return *lies, *kind, *autocast, *modes
