"""What a build on a GPU has to measure, and what it leaves out: on the meta device, for an H200.

Each candidate takes a compilation, an answer to compare and a time: some 50 ms on an H200, and its
share of 300 s of compiling.
"""

from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn

from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import key_of
from resfuse.kernels.engine.ir.graph import Conv, Graph
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.planning.chunking import stage_ends
from resfuse.kernels.engine.tactics import tactics_for
from resfuse.kernels.engine.tactics.gpu import (
    triton_block_tail,
    triton_conv,
    triton_split_k,
    triton_stem,
)
from resfuse.kernels.gpu.conv.conv_config import Config
from resfuse.resnet_ref import create

pytestmark = pytest.mark.slow


@cache
def network(name: str, batch: int) -> Graph:
    model = create(name, device="meta").eval().half()
    x = torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="meta")
    return capture(model, x)[0]


def offered(graph: Graph) -> Counter[str]:
    """How many different candidates are measured, by tactic."""
    tactics = {name: m for name, m in tactics_for("cuda").items() if name != "onednn"}
    found = {
        (key_of(graph.part(candidate.start, candidate.stop)), candidate.label()): candidate.tactic
        for same in find_candidates(graph, tactics)
        for candidate in same
    }
    return Counter(found.values())


@pytest.mark.parametrize("batch, most", [(256, 365), (1, 440)])
def test_resnet50_has_a_bounded_number_of_choices(batch: int, most: int) -> None:
    """Beside cuDNN's, one or two a convolution: there were 501 at batch 256 and 624 at batch 1."""
    graph = network("resnet50", batch)
    found = offered(graph)
    cudnn = found.pop("cudnn")
    assert found.total() <= most, found
    assert cudnn <= 50
    for tactic in ("stem", "triton_conv1x1", "projection", "block_tail", "split_k"):
        assert found[tactic]
    without = [n.name for at, n in enumerate(graph.nodes) if not _of_ours(graph, at)]
    assert len(without) == 2  # the pool, which the stem's kernel computes, and the mean


def _of_ours(graph: Graph, at: int) -> bool:
    """Whether a kernel of ours takes the node, alone or with those behind it."""
    names = ("stem", "triton_conv", "triton_conv1x1")
    return any(list(tactics_for("cuda")[name].segments(graph, at)) for name in names)


# results/nvidia-h200/NOTES.md: H and W, channels, stride, the fastest tile
MEASURED = [
    (56, 64, 1, Config(128, 64, 64, 4, 3, loop="taps inner")),
    (28, 128, 1, Config(128, 128, 64, 4, 3, loop="taps inner")),
    (14, 256, 1, Config(128, 128, 64, 4, 3, loop="taps inner")),
    (7, 512, 1, Config(128, 128, 64, 4, 3, loop="taps inner")),
    (56, 128, 2, Config(128, 128, 64, 4, 3, loop="taps inner")),
    (28, 256, 2, Config(128, 128, 64, 4, 3, loop="taps inner")),
    (14, 512, 2, Config(128, 128, 64, 8, 3)),  # with a stage more: it has lost one since
]


def test_the_fastest_tiles_measured_are_among_those_offered() -> None:
    graph = network("resnet50", 256)
    convolutions = [n.op.problem for n in graph.nodes if isinstance(n.op, Conv)]
    for h, c, stride, tile in MEASURED:
        problem = next(
            p for p in convolutions if (p.r, p.h, p.c, p.stride) == (3, h, c, (stride, stride))
        )
        tiles = triton_conv._tiles(problem, 132)
        assert tile in tiles and len(tiles) == triton_conv.MOST
        assert any(config.is_proven for config in tiles)


def test_grouped_and_depthwise_convolutions_keep_a_choice() -> None:
    """ResNeXt's groups of 4 channels are packed until they fill a step."""
    graph = network("resnext50_32x4d", 256)
    grouped = [at for at, n in enumerate(graph.nodes)
               if isinstance(n.op, Conv) and n.op.problem.groups > 1]  # fmt: skip
    assert len(grouped) == 16
    assert all(list(triton_conv.segments(graph, at)) for at in grouped)
    for groups, form in ((32, "depthwise"), (16, "implicit_gemm"), (1, "implicit_gemm")):
        graph, _ = capture(nn.Conv2d(32, 32, 3, padding=1, groups=groups).eval().half(),
                           torch.empty(2, 32, 8, 8, dtype=torch.float16))  # fmt: skip
        forms = {candidate.settings["form"] for candidate in triton_conv.segments(graph, 0)}
        assert forms == {form}


@pytest.mark.parametrize("batch", (1, 256))
def test_a_stem_is_no_implicit_gemm(batch: int) -> None:
    graph = network("resnet50", batch)
    assert list(triton_stem.segments(graph, 0))
    assert not list(triton_conv.segments(graph, 0)) and not list(triton_split_k.segments(graph, 0))
    tiny, _ = capture(nn.Conv2d(3, 16, 3, padding=1).eval().half(),
                      torch.empty(1, 3, 32, 32, dtype=torch.float16))  # fmt: skip
    assert not list(triton_conv.segments(tiny, 0)) and not list(triton_split_k.segments(tiny, 0))
    assert list(tactics_for("cuda")["eager"].segments(tiny, 0))


def test_tails_that_lost_to_cudnn_are_tried_once() -> None:
    graph = network("resnet50", 256)
    tails = [
        candidate
        for at in range(len(graph.nodes))
        for candidate in triton_block_tail.segments(graph, at)
    ]
    by_part: dict[tuple[int, int], int] = Counter((c.start, c.stop) for c in tails)
    for (at, _), count in by_part.items():
        channels = graph.nodes[at].op.problem.c  # type: ignore[union-attr]
        assert count == 1 if channels > 64 else count > 1
    assert {graph.nodes[at].op.problem.c for at, _ in by_part} == {64, 128, 256}  # type: ignore[union-attr]


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("name", ("resnet50", "resnext50_32x4d"))
def test_early_stages_need_no_candidates_of_their_own(name: str, device: str) -> None:
    """Their plans are made of the whole graph's, which have been timed, and miss nothing."""
    graph, tactics = network(name, 8), tactics_for(device)
    every = [candidate for group in find_candidates(graph, tactics) for candidate in group]
    ends = stage_ends(graph)
    assert ends
    for end in ends:
        within = [candidate for candidate in every if candidate.stop <= end]
        own = find_candidates(graph.part(0, end), tactics)
        assert within == [candidate for group in own for candidate in group]
