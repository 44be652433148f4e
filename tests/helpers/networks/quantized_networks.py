"""Small networks to quantise, the files that other tools make of them, and ONNX Runtime's answers
to such files."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx as fx
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from resfuse.kernels import load_onnx
from resfuse.kernels.onnx_reader.operators.quantize_linear import FakeQuantize


class Gated(nn.Module):
    """Blocks of MobileNetV3 and EfficientNet: hard-swish, SiLU, and gates from means of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.deep = nn.Sequential(
            nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16), nn.SiLU()
        )
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.last(y * gate)
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """Concatenations, a shuffle, pools of all kinds, slopes, odd channels, a sum behind an
    activation, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 24, 3, 2, 1), nn.PReLU(24)
        nn.init.uniform_(self.slope.weight, 0.1, 0.4)
        self.left, self.right = nn.Conv2d(24, 12, 1), nn.Conv2d(24, 36, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(72)
        self.odd, self.same = nn.Conv2d(72, 37, (1, 3), padding=(0, 1)), nn.Conv2d(37, 37, 1)
        self.whole = nn.Linear(37 * 4 * 4, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.slope(self.first(x))
        inner = torch.cat([F.hardtanh(self.left(y), 0, 6), torch.sigmoid(self.right(y))], 1)
        z = F.channel_shuffle(torch.cat([inner, F.max_pool2d(y, 3, 1, 1)], 1), 4)
        z = F.leaky_relu(self.odd(self.norm(z)), 0.2)
        z = F.max_pool2d(z + F.relu(self.same(z)), 3, 2, 0, ceil_mode=True)
        z = F.avg_pool2d(z, 3, 2, 1, count_include_pad=False)
        maps = F.interpolate(z[:, :, 1:4:2], scale_factor=2, mode="nearest")
        return maps, F.softmax(self.whole(z.flatten(1)), 1)


def resnet() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10)


def mobilenet() -> nn.Module:
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
    return torchvision.models.MobileNetV2(num_classes=10, inverted_residual_setting=settings)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet,
    "MobileNetV2's blocks": mobilenet,
    "gates": Gated,
    "concatenations": Joined,
}


def smooth_images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, (32, 32), mode="bicubic")


def network(name: str) -> nn.Module:
    """A network whose batch norms have seen images."""
    torch.manual_seed(0)
    model = NETWORKS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(smooth_images(16, seed=5))
    return model.eval()


def float_file(name: str, path: Path) -> Path:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network(name), (smooth_images(1),), str(path), dynamo=False, opset_version=17,
            input_names=["x"], dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    return path


def calibration() -> list[dict[str, np.ndarray]]:
    return [{"x": smooth_images(8, seed).numpy()} for seed in range(10, 14)]


def by_onnxruntime(name: str, path: Path, activations: str = "QUInt8") -> None:
    """Writes what quantize_static makes of a network: weights with a scale for each channel.

    Args:
        activations: "QUInt8" or "QInt8".
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[dict[str, np.ndarray]] = iter(calibration())

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    logging.disable(logging.WARNING)
    try:
        quantization.quantize_static(
            str(float_file(name, path.with_name("float.onnx"))), str(path), Reader(),
            quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType[activations],
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def by_nncf(name: str, path: Path) -> None:
    """Writes what nncf.quantize makes of a network."""
    import nncf
    import onnx

    given = onnx.load(float_file(name, path.with_name("float.onnx")))
    onnx.save(nncf.quantize(given, nncf.Dataset(calibration()), subset_size=4), path)


def of_onnxruntime(path: Path, x: Tensor, optimised: bool = False) -> list[Tensor]:
    """Returns ONNX Runtime's answers: node by node in floating point as the file says, or by its
    kernels for integers, and of those, where the CPU has no VNNI, by the ones that do not saturate
    sums of two products."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    if not optimised:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.graph_optimization_level = level
    settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ]


def relative_error(y: Tensor, want: Tensor) -> float:
    return float((y.double() - want.double()).norm() / want.double().norm())


def listed(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def require_each_step_alike(path: Path, x: Tensor) -> None:
    """Raises AssertionError unless every rounding of the file as load_onnx reads it gives what ONNX
    Runtime gives for the same inputs, but for numbers halfway between two integers.

    One of those near the input moves others behind it, in a network of random weights up to 4 % of
    the output's norm; so each step is given ONNX Runtime's values.
    """
    import onnx
    from onnx import helper

    model = onnx.load(path)
    quantised = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    own = {output.name for output in model.graph.output}
    for node in model.graph.node:
        pair = node.op_type == "DequantizeLinear" and node.input[0] in quantised
        if pair and node.output[0] not in own:
            model.graph.output.append(helper.make_tensor_value_info(node.output[0], 1, None))
    onnx.save(model, path.with_name("steps.onnx"))
    module = load_onnx(path.with_name("steps.onnx"))
    (nodes,) = module.graph.output_node().args
    wanted = of_onnxruntime(path.with_name("steps.onnx"), x)
    given = dict(zip(nodes, wanted, strict=True))
    compared = 0

    class Steps(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal compared
            y = super().run_node(n)
            if n not in given:
                return y
            compared += 1
            off = (y - given[n]).abs()
            layer = module.get_submodule(n.target) if n.op == "call_module" else None
            if isinstance(layer, FakeQuantize):
                assert float(off.max()) < 1.01 * layer.scale, n
                assert float((off > 0.5 * layer.scale).float().mean()) < 0.002, n
            else:
                assert relative_error(y, given[n]) < 1e-5, n
            return given[n]

    with torch.inference_mode():
        Steps(module).run(x)
    assert compared > 5
