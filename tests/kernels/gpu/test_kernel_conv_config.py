"""The configurations of conv_bn_act: what they refuse, which are offered for a problem, and which
is chosen. None is timed.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_inputs import DEVICE, convolution
from resfuse.kernels.gpu.conv import conv, conv_config, depthwise
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.gpu.conv.conv_config import (
    CHANNELS_INNER,
    CONFIGS,
    Config,
    candidates,
    choose,
    cycles,
)
from resfuse.kernels.ops.conv_problem import MATH_MODES, ConvProblem, Epilogue, Geometry, dtypes_of

pytestmark = pytest.mark.slow
SMALL = Config(16, 16, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_m": 24}, "block_m: 24"),
        ({"block_k": 8}, "block_k: 8"),
        ({"num_warps": 3}, "num_warps: 3"),
        ({"num_stages": 0}, "num_stages: 0"),
        ({"group_m": 0}, "group_m: 0"),
        ({"loop": "channels"}, "loop: channels"),
    ],
)
def test_a_config_refuses_values_it_cannot_have(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changed)


RESNET = ConvProblem(32, 64, 56, 56, 64, 3, 3, Geometry(padding=(1, 1)))


@pytest.mark.parametrize(
    ("config", "problem", "message"),
    [
        (Config(256, 256, 16, num_warps=8), RESNET, "256 accumulators"),
        (
            Config(128, 64, 16),
            replace(RESNET, geometry=RESNET.geometry._replace(groups=2), dtypes=dtypes_of("ieee")),
            "64 accumulators",
        ),
        (
            Config(128, 64, 64),
            replace(RESNET, geometry=RESNET.geometry._replace(groups=16)),
            "64 accumulators",
        ),
        (Config(128, 128, 64, num_warps=8, num_stages=6), RESNET, "196608 bytes"),
        (SMALL, replace(RESNET, n=1 << 20), "pixels of output"),
        (SMALL, replace(RESNET, n=1, h=1 << 13, w=1 << 13), "elements in the images"),
        (SMALL, replace(RESNET, c=1 << 14, k=1 << 14), "argument weight"),
    ],
)
def test_a_launch_out_of_range_is_refused(
    config: Config, problem: ConvProblem, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(problem)


def test_a_launch_refuses_memory_it_would_misread() -> None:
    x, weight, bias = convolution((1, 16, 4, 5), 16, (1, 1))
    problem = problem_of(x, weight, Geometry(), Epilogue("relu"))
    y = torch.empty_like(x)
    with pytest.raises(ValueError, match="argument x: strides"):
        conv.launch(problem, Tensors(x.contiguous(), weight, bias, None, None, y), SMALL)
    apart = torch.zeros(32, device=DEVICE)[::2]
    with pytest.raises(ValueError, match="argument bias: strides"):
        conv.launch(problem, Tensors(x, weight, apart, None, None, y), SMALL)


@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_the_choice_is_a_candidate_and_candidates_are_valid(math_mode: str) -> None:
    for problem in conv_config.resnet_problems(math_mode):
        offered = candidates(problem)
        assert choose(problem, 132) in offered
        assert set(offered) <= set(CONFIGS)
        for config in offered:
            config.check(problem)


def test_the_choice_follows_the_problem_and_the_gpu() -> None:
    def tile(problem: ConvProblem, sms: int = 132) -> int:
        config = choose(problem, sms)
        return config.block_m * config.block_n

    late = ConvProblem(1, 512, 7, 7, 512, 3, 3, Geometry(padding=(1, 1)))
    assert tile(late) < tile(replace(late, n=256))  # few tiles: small ones, for all to have work
    assert tile(replace(late, n=8), 16) > tile(replace(late, n=8), 132)
    grouped = ConvProblem(32, 128, 56, 56, 128, 3, 3, Geometry(padding=(1, 1), groups=32))
    assert choose(grouped, 132).block_n == 32  # the least arithmetic on zeros
    assert choose(ConvProblem(32, 64, 56, 56, 256, 1, 1), 132).loop == CHANNELS_INNER


def test_a_model_of_time_grows_with_the_work() -> None:
    config = CONFIGS[0]
    assert cycles(replace(RESNET, n=256), config, 132) > cycles(RESNET, config, 132)
    assert cycles(RESNET, config, 66) > cycles(RESNET, config, 132)
    assert cycles(replace(RESNET, dtypes=dtypes_of("tf32")), config, 132) > cycles(
        RESNET, config, 132
    )


def test_no_candidate_says_why() -> None:
    with pytest.raises(ValueError, match="pixels of output"):
        choose(replace(RESNET, n=1 << 20), 132)


def test_depthwise_refuses_groups_of_several_channels() -> None:
    with pytest.raises(ValueError, match="argument groups: 1 of 64"):
        depthwise.CONFIGS[0].check(RESNET)
    with pytest.raises(ValueError, match="block_n: 48"):
        depthwise.Config(16, 48)
    with pytest.raises(ValueError, match="num_warps: 16"):
        depthwise.Config(16, 16, 16)


def test_depthwise_tiles_are_no_wider_than_they_need_be() -> None:
    narrow = ConvProblem(1, 8, 9, 9, 8, 3, 3, Geometry(groups=8))
    assert depthwise.choose(narrow, 132).block_n == 16
    assert (
        depthwise.choose(
            replace(narrow, c=64, k=64, geometry=narrow.geometry._replace(groups=64)), 132
        ).block_n
        == 64
    )


def test_every_configuration_is_shipped_on_the_meta_device() -> None:
    labels = [label for label, _ in conv.shipped()]
    assert len(set(labels)) == len(labels)
    for math_mode, configs in conv_config.BY_MATH_MODE.items():
        for config in configs:
            assert any(f"{math_mode} {config.label()}" in label for label in labels)
    assert sum("depthwise" in label for label in labels) == len(depthwise.CONFIGS)
    for _, launch in conv.shipped():
        on = [value.device.type for value in launch.args.values() if isinstance(value, Tensor)]
        assert set(on) == {"meta"}
