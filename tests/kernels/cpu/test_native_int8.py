"""Native convolutions on uint8 against their integer twin, bit by bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int8_steps import Int8Conv, of_int8, random_conv, random_values
from native_problems import FORMS, PROBLEMS, config_of, every_config, problem_of
from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.program import ACTIVATIONS
from resfuse.kernels.ops.quantization import Quantization

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]

INT8_FORMS = {name: form for name, form in FORMS.items() if form[0] != "winograd"}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("residual", ["none", "before"])
def test_every_way_to_compute_a_convolution_gives_the_twins_bits(name: str, residual: str) -> None:
    epilogue = PROBLEMS[name].epilogue._replace(residual=residual)  # type: ignore[arg-type]
    conv = random_conv(replace(PROBLEMS[name], n=3, epilogue=epilogue))
    tried = every_config(conv.problem)
    assert tried, "nothing was tried"
    want = conv.expected()
    for config in tried:
        for threads in (1, 2):
            assert torch.equal(conv.run(config, threads), want), config
