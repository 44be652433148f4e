"""`build_engine` of what torchao's PT2E makes of networks: all that its X86InductorQuantizer rounds
is computed on integers, by its scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao")
pytest.importorskip("onnx")  # of quantized_networks

from quantized_networks import NETWORKS, listed, network, relative_error, smooth_images
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Conv, Graph
from resfuse.kernels.engine.quantization.given_scales import with_given_scales
from resfuse.kernels.engine.tactics import eager

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FREE = ({0: torch.export.Dim("n", min=1, max=16)},)


@torch.no_grad()
def converted(name: str) -> nn.Module:
    """A network as convert_pt2e returns it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    x = smooth_images(4)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(network(name), (x,), dynamic_shapes=FREE, strict=True)
    prepared = prepare_pt2e(program.module(), quantizer)
    for seed in range(10, 14):
        prepared(smooth_images(8, seed))
    return convert_pt2e(prepared)


def convolutions(graph: Graph) -> list[torch.dtype]:
    return [graph.values[n.inputs[0]].dtype for n in graph.nodes if isinstance(n.op, Conv)]


def require_near(answers: Any, wanted: Any) -> None:
    """Numbers halfway between two integers move some behind them, so not every image is as near."""
    for y, want in zip(listed(answers), listed(wanted), strict=True):
        errors = [relative_error(each, one) for each, one in zip(y, want, strict=True)]
        assert max(errors) < 0.1
        assert min(errors) < 0.02


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_those_of_the_program(name: str) -> None:
    model, x = converted(name), smooth_images(4, seed=9)
    graph, state = capture(model, x)
    narrow = with_given_scales(graph, state)
    computed = convolutions(narrow)
    if name in ("ResNet", "MobileNetV2's blocks"):
        assert set(computed) == {torch.uint8}
    assert torch.uint8 in computed
    values: dict[str, Tensor] = {narrow.input: x}
    with torch.no_grad():
        for node in narrow.nodes:
            function = eager.function_of(node, narrow.values, state)
            values[node.name] = function(*(values[read] for read in node.inputs))
        want = model(x)
    require_near([values[output] for output in narrow.outputs], want)


def test_an_engine_of_a_program_that_was_exported_again(tmp_path: Path) -> None:
    model, x = converted("ResNet"), smooth_images(3, seed=9)
    again = torch.export.export(model, (x,), dynamic_shapes=FREE).module()
    engine = build_engine(again, x, batch_sizes=[1, 3], tiling=False)
    assert engine.precision == "int8"
    with torch.no_grad():
        require_near(engine(x), model(x))
        require_near(engine(x[:1]), model(x[:1]))
    engine.save(tmp_path / "engine")
    assert torch.equal(load_engine(tmp_path / "engine")(x), engine(x))
