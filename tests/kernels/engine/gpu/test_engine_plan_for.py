"""What the engine's tactics for GPUs find in ResNet-50, and what is planned with them for a GPU
that is not here.
"""

import json
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

from resfuse.kernels import plan_for
from resfuse.kernels.engine.cost.gpus import GPUS, Gpu
from resfuse.kernels.engine.cost.roofline_cost import RooflineCost
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.planning.planner import TimedCandidate, plan
from resfuse.kernels.engine.predict import predicted
from resfuse.kernels.engine.saving.plan_json import segments_from_json, segments_to_json
from resfuse.kernels.engine.tactics import TACTICS, tactics_for
from resfuse.kernels.engine.tactics.gpu import triton_block_tail

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]

BY_CONV = ("cudnn", "triton_conv", "triton_conv1x1", "split_k", "eager")


@pytest.fixture(scope="module")
def resnet50() -> tuple[nn.Module, Tensor]:
    """In fp16 for a batch of 256, without memory: plans read shapes alone."""
    with torch.device("meta"):
        model = torchvision.models.resnet50(weights=None).eval().half()
        return model, torch.empty(256, 3, 224, 224, dtype=torch.float16)


@pytest.fixture(scope="module")
def graph50(resnet50: tuple[nn.Module, Tensor]) -> Graph:
    return capture(*resnet50)[0]


def layers(graph: Graph, candidate: Candidate) -> tuple[str, ...]:
    """`layer1.0.conv2`, say, of each node; the pool has no name."""
    nodes = graph.nodes[candidate.start : candidate.stop]
    return tuple(n.op.weight.removesuffix(".weight") for n in nodes if isinstance(n.op, Conv))


def found_by(graph: Graph, tactic: str) -> set[tuple[str, ...]]:
    module = TACTICS[tactic].load()
    every: Iterator[Candidate] = (
        candidate for at in range(len(graph.nodes)) for candidate in module.segments(graph, at)
    )
    return {layers(graph, candidate) for candidate in every}


def test_what_is_found_in_resnet50(graph50: Graph) -> None:
    assert found_by(graph50, "stem") == {("conv1",)}
    assert found_by(graph50, "projection") == {
        (f"layer{i}.0.downsample.0", f"layer{i}.0.conv3") for i in (1, 2, 3, 4)
    }
    tails = set()
    for stage, blocks in ((1, 3), (2, 4), (3, 6)):  # stage 4's 512 channels fit no tile
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            projected = (f"{name}.downsample.0",) if block == 0 else ()
            tail = (f"{name}.conv2", *projected, f"{name}.conv3")
            tails.add(tail)
            ends = block + 1 == blocks
            following = f"layer{stage + 1}.0" if ends else f"layer{stage}.{block + 1}"
            if following != "layer4.0":
                tails.add((*tail, f"{following}.conv1"))
    assert found_by(graph50, "block_tail") == tails


def test_the_planner_takes_several_nodes_at_once_where_that_is_cheaper(graph50: Graph) -> None:
    tactics = tactics_for("cuda")

    every = [one for group in find_candidates(graph50, tactics) for one in group]

    for of_several, most in ((1.5, {2, 3, 4}), (5.0, {1})):
        costs = {True: 1.0, False: of_several}
        timed = [TimedCandidate(c, costs[c.stop - c.start == 1]) for c in every]
        made = plan(graph50, timed).segments
        lengths = {s.candidate.stop - s.candidate.start for s in made}
        assert lengths - {1} == most - {1}
        assert sum(s.candidate.stop - s.candidate.start for s in made) == len(graph50.nodes)


def test_the_plan_for_an_h200_chains_the_first_three_stages(
    resnet50: tuple[nn.Module, Tensor],
) -> None:
    made = plan_for(*resnet50, gpu="h200")
    by_tactic: dict[str, list[str]] = {}
    for segment in made.segments:
        names = layers(made.graph, segment.candidate)
        by_tactic.setdefault(segment.candidate.tactic, []).extend(names)
    chained = {name.rsplit(".", 1)[0] for name in by_tactic["block_tail"] if "conv2" in name}
    # Of a stage's first block the projection is folded in instead, which saves more; not in the
    # third, whose projection costs little by itself, for it reads a quarter of its input's pixels.
    every = {f"layer{i}.{j}" for i, n in ((1, 3), (2, 4), (3, 6)) for j in range(1, n)}
    assert chained == {*every, "layer3.0"}
    assert {name for name in by_tactic["projection"] if name.endswith("conv3")} == {
        f"layer{i}.0.conv3" for i in (1, 2, 4)
    }
    assert by_tactic["stem"] == ["conv1"]
    for segment in made.segments:
        names = layers(made.graph, segment.candidate)
        if names and names[0].startswith("layer4") and segment.candidate.tactic != "projection":
            assert len(names) == 1
    again = segments_from_json(json.loads(json.dumps(segments_to_json(made.segments))))
    assert again == made.segments


def test_the_more_is_fused_the_faster_the_prediction(graph50: Graph) -> None:
    """And at rates measured on an H200, conv by conv comes to the limit worked out by hand."""
    every = tactics_for("cuda")
    steps = [
        ("eager",),
        ("cudnn", "eager"),
        BY_CONV,
        (*BY_CONV, "projection"),
        (*BY_CONV, "projection", "stem"),
        (*BY_CONV, "projection", "stem", "block_tail"),
    ]
    measured = Gpu("measured", {"fp16": 790.0}, 4.3)
    rates = []
    for names in steps:
        offered = {name: every[name] for name in names}
        timed = predicted(graph50, offered, RooflineCost(graph50, measured, 0))
        rates.append(256e3 / plan(graph50, timed).ms)
    assert rates == sorted(rates) and len(set(rates)) == len(rates)
    assert rates[0] == pytest.approx(27_000, rel=0.15)  # bytes and FLOPs, each layer by itself
    assert rates[2] == pytest.approx(60_400, rel=0.03)
    assert 60_400 < rates[-1] < 89_000  # with every block of stages 1 to 3 chained


def test_small_batches_pay_for_launches(resnet50: tuple[nn.Module, Tensor]) -> None:
    model, example = resnet50
    made = plan_for(model, example[:1])
    overhead = RooflineCost(made.graph, GPUS["h200"], 1.3)(Candidate("cudnn", 2, 3)) - RooflineCost(
        made.graph, GPUS["h200"], 0.0
    )(Candidate("cudnn", 2, 3))
    assert overhead == pytest.approx(1.3e-3)
    assert made.ms > len(made.segments) * 1.3e-3


def test_a_projection_within_a_tail_is_a_kernel_of_its_own(graph50: Graph) -> None:
    at = next(i for i in range(len(graph50.nodes)) if layers(graph50, Candidate("", i, i + 1))
              == ("layer1.0.conv2",))  # fmt: skip
    with_chain = max(triton_block_tail.segments(graph50, at), key=lambda candidate: candidate.stop)
    parts = triton_block_tail.kernels(graph50, with_chain)
    assert [len(part.nodes) for part in parts] == [1, 3]
    written = graph50.values[graph50.nodes[at + 1].name]
    assert parts[0].outputs and parts[0].values[parts[0].outputs[0]] == written
    cost = RooflineCost(graph50, GPUS["h200"])
    alone = cost(Candidate("triton_conv1x1", at + 1, at + 2))
    assert cost(with_chain) > alone + written.shape[0] * 256 * 56 * 56 * 2 / 4.8e9


def test_a_prediction_says_that_it_is_one(resnet50: tuple[nn.Module, Tensor]) -> None:
    model, example = resnet50
    told = plan_for(model, example[:8], gpu="b200").explain()
    assert "Times are predicted by the roofline, not measured: B200's data sheet" in told
    assert "2250 TFLOP/s in fp16 and 7.7 TB/s" in told
    assert "block_tail" in told and "Times were measured" not in told


def test_a_plan_in_int8_needs_no_calibration(resnet50: tuple[nn.Module, Tensor]) -> None:
    """Its time is near that of the bytes and integers of its convolutions, one by one."""
    model, example = resnet50
    with torch.device("meta"):
        wide = torchvision.models.resnet50(weights=None).eval()
    made = plan_for(wide, example.float(), precision="int8")
    assert {s.candidate.tactic for s in made.segments} == {"int8", "int8_maps"}
    assert len(made.segments) == 57
    convs = [n.op.problem for n in made.graph.nodes if isinstance(n.op, Conv)]
    assert {p.math_mode for p in convs[:-1]} == {"int8"} and convs[-1].math_mode == "int8_fp32"
    least = sum(max(p.flops / 1979e9, p.least_bytes / 4.8e9) for p in convs)
    assert least < made.ms < 1.2 * least
    assert made.ms < 0.6 * plan_for(model, example, tactics=("cudnn", "eager")).ms
    told = made.explain()
    assert "1979 TFLOP/s in int8" in told and "to int8" in told
    with pytest.raises(ValueError, match="argument precision: 'int4'; accepted: int8"):
        plan_for(wide, example.float(), precision="int4")


def test_what_cannot_be_planned_for_is_said(resnet50: tuple[nn.Module, Tensor]) -> None:
    model, example = resnet50
    with pytest.raises(ValueError, match="argument gpu: 'h300' is not known; accepted: a100, h100"):
        plan_for(model, example, gpu="h300")
    with pytest.raises(ValueError, match="argument tactics: 'native' is not known; accepted: cud"):
        plan_for(model, example, tactics=["native"])
    with pytest.raises(ValueError, match="no tactic computes"):
        plan_for(model, example, tactics=["cudnn"])
    with torch.device("meta"), pytest.raises(ValueError, match="training mode"):
        plan_for(nn.Conv2d(3, 4, 1), torch.empty(1, 3, 4, 4))
