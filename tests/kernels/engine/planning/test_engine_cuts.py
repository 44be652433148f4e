"""Limits of networks by how they are cut: against those worked out by hand, and invariants."""

from collections import Counter

import pytest
import torch
from torch import nn

from resfuse.kernels.engine.cost.cost import cost_of
from resfuse.kernels.engine.cost.cuts import CUTS, kernel_cost, limit, with_batch
from resfuse.kernels.engine.cost.gpus import GPUS, Gpu
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Conv, Graph
from resfuse.resnet_ref import create
from resfuse.resnet_ref.cifar import cifar_preact

pytestmark = pytest.mark.slow

H200 = Gpu("measured", {"fp16": 790.0}, 4.3)
# ResNet-50 v1.5 in fp16 at batch 256, 790 TFLOP/s and 4.3 TB/s: images/s and MB (10^6) an image.
BY_HAND = {
    "conv by conv": (60_400, 54.7),
    "back to back": (79_000, 39.7),
    "chain": (89_000, 28.9),
    "whole block": (93_200, 23.0),
}


def traced(model: nn.Module, *shape: int) -> Graph:
    with torch.device("meta"):
        return capture(model.eval().half(), torch.empty(shape, dtype=torch.float16))[0]


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    with torch.device("meta"):
        return {
            "resnet50": traced(create("resnet50"), 1, 3, 224, 224),
            "resnet18": traced(create("resnet18"), 1, 3, 224, 224),
            "preact": traced(cifar_preact(29), 1, 3, 32, 32),
            "option A": traced(create("cifar_resnet20"), 1, 3, 32, 32),
            "plain": traced(create("vgg19_bn"), 1, 3, 224, 224),
        }


def test_resnet50_comes_to_the_limits_worked_out_by_hand(graphs: dict[str, Graph]) -> None:
    graph = with_batch(graphs["resnet50"], 256)
    for cut, (rate, megabytes) in BY_HAND.items():
        found = limit(graph, cut, H200, "fp16")
        assert 256e3 / found.ms == pytest.approx(rate, rel=0.003)
        assert found.moved / 256e6 == pytest.approx(megabytes, rel=0.005)
    assert limit(graph, "conv by conv", H200, "fp16").bound == "bytes"
    assert limit(graph, "chain", H200, "fp16").bound == "FLOPs"


@pytest.mark.parametrize("name", ["resnet50", "resnet18", "preact", "option A", "plain"])
@pytest.mark.parametrize("n", [1, 32])
def test_every_node_is_in_one_kernel_and_more_fused_is_never_more(
    graphs: dict[str, Graph], name: str, n: int
) -> None:
    graph = with_batch(graphs[name], n)
    arithmetic = sum(node.op.problem.flops for node in graph.nodes if isinstance(node.op, Conv))
    before = None
    for cut in CUTS:
        kernels = CUTS[cut].kernels(graph)
        counted = Counter(node.name for kernel in kernels for node in kernel)
        assert counted == Counter(node.name for node in graph.nodes)
        found = limit(graph, cut, H200, "fp16")
        assert found.flops == arithmetic and found.kernels == len(kernels)
        assert found.ms >= H200.ms("fp16", arithmetic, 0)
        assert 0 <= found.memory_ms <= found.ms
        if before is not None and cut != "whole block":
            assert found.moved <= before.moved and found.ms <= before.ms * (1 + 1e-12)
        before = found
    one_by_one, blocks = (limit(graph, c, H200, "fp16") for c in ("conv by conv", "whole block"))
    assert blocks.moved <= one_by_one.moved


def test_a_kernel_moves_what_others_see_of_it(graphs: dict[str, Graph]) -> None:
    """conv2 and conv3 of layer1.1: reads its input and the residual, writes the sum."""
    graph = with_batch(graphs["resnet50"], 8)
    nodes = {node.op.weight: node for node in graph.nodes if isinstance(node.op, Conv)}
    kernel = [nodes["layer1.1.conv2.weight"], nodes["layer1.1.conv3.weight"]]
    pixels, weights = 8 * 56 * 56, 64 * 64 * 9 + 64 + 256 * 64 + 256
    cost = kernel_cost(graph, kernel)
    assert cost.moved == 2 * (pixels * (64 + 256 + 256) + weights)
    assert cost.flops == 2 * pixels * 64 * (64 * 9 + 256)


def test_a_projection_reads_the_pixels_it_looks_at(graphs: dict[str, Graph]) -> None:
    graph = graphs["resnet50"]
    (at,) = (
        i for i, node in enumerate(graph.nodes)
        if isinstance(node.op, Conv) and node.op.weight == "layer2.0.downsample.0.weight"
    )  # fmt: skip
    read, written = 28 * 28 * 256, 28 * 28 * 512
    assert cost_of(graph.part(at, at + 1)).moved == 2 * (read + written + 512 * 256 + 512)


def test_another_batch_is_what_tracing_at_it_gives(graphs: dict[str, Graph]) -> None:
    with torch.device("meta"):
        at_four = traced(create("resnet18"), 4, 3, 224, 224)
    again = with_batch(graphs["resnet18"], 4)
    assert again.values == at_four.values
    assert [n.op for n in again.nodes] == [n.op for n in at_four.nodes]


def test_data_sheets_are_plausible_and_have_sources() -> None:
    """Dense rates: half precision is at least as fast as tf32, and that as fp32."""
    for gpu in GPUS.values():
        rates = gpu.tflops
        assert rates["int8"] == rates["int8_fp32"] >= 1.9 * rates["fp16"]
        assert rates["fp16"] == rates["bf16"] > rates["tf32"] >= rates["ieee"]
        assert 30 < 1e0 * rates["fp16"] / gpu.tb_per_s < 500  # FLOP a byte
        assert "data" in gpu.source or "whitepaper" in gpu.source
    assert GPUS["mi300x"].bound("fp16", 10**12, 10**9) == "FLOPs"
    assert GPUS["l4"].bound("fp16", 10**9, 10**9) == "bytes"
