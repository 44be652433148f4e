"""What torch itself can fuse on a GPU: folded weights, and cuDNN's convolution + bias + add + ReLU.

The strongest conv-by-conv peer that needs no other package. On a GPU it runs as one CUDA graph, as
an engine would.
"""

import operator
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resfuse.bench.backends.output_tree import require_one_tensor
from resfuse.bench.common.errors import CannotTake, Unavailable
from resfuse.kernels.gpu.cudnn.cudnn_probe import decided
from resfuse.kernels.gpu.cudnn.cudnn_relu import conv_relu, searching, zeros_for
from resfuse.kernels.ops.bn_folding import fold_conv_bn
from resfuse.kernels.ops.conv_problem import math_mode_of, output_shape

Kind = TypeVar("Kind", bound=nn.Module)


class _Zeros:
    """Zeros that every layer's z is a view of."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, count: int, like: Tensor) -> Tensor:
        """[count], of the dtype and on the device of `like`."""
        if self._memory.numel() < count:
            self._memory = like.new_zeros(count)
        return self._memory[:count]


class _Conv(nn.Module):
    """A folded convolution and what follows: nothing, a ReLU, or a residual and a ReLU."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, form: str, zeros: _Zeros
    ) -> None:
        super().__init__()
        weight, bias = fold_conv_bn(conv, bn) if bn is not None else (conv.weight, conv.bias)
        if bias is None:
            bias = weight.new_zeros(conv.out_channels)
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())
        self.stride, self.padding = list(conv.stride), _pixels(conv)
        self.dilation, self.groups = list(conv.dilation), conv.groups
        self.form, self.zeros = form, zeros
        self.relu = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            return torch.cudnn_convolution_add_relu(
                x, self.weight, residual, 1.0, self.bias, *geometry
            )
        if not self.relu:
            return F.conv2d(x, self.weight, self.bias, *geometry)
        y_shape = output_shape(x.shape, self.weight.shape, *geometry[:3])
        z = zeros_for(self.form, y_shape, lambda count: self.zeros.of(count, x))
        return conv_relu(self.form, x, self.weight, self.bias, z, geometry)


def require(device: torch.device) -> None:
    """Raises Unavailable without a CUDA device."""
    if device.type != "cuda":
        raise Unavailable("torch's fused convolution ops are cuDNN's and need an NVIDIA GPU")


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Folds, rewrites and captures, with the plans and the form of ReLU that are best here.

    Raises:
        Unavailable: no CUDA device.
    """
    require(example.device)
    require_one_tensor(model, example, "cudnn_fused")
    way = decided(math_mode_of(example.dtype, example.device), example.device)
    with searching(way.search):
        return _graphed(rewrite(model, way.form), example)


def rewrite(model: nn.Module, form: str) -> fx.GraphModule:
    """The model with every conv(-BN)(-add)(-ReLU) as one fused op; the rest stays as it is.

    Args:
        model: in evaluation mode.
        form: of a convolution with ReLU and no residual, a name in cudnn_relu.FORMS.
    """
    zeros = _Zeros()
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:
        raise CannotTake(f"cudnn_fused: torch.fx cannot trace the network: {error}") from error
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        conv = _module(node, modules, nn.Conv2d)
        if conv is None:
            continue
        follower = _only_user(node)
        bn = _module(follower, modules, nn.BatchNorm2d) if follower else None
        fused = _Conv(conv, bn, form, zeros)
        name = str(node.target).replace(".", "_") + "_fused"
        traced.add_submodule(name, fused)
        node.target = name
        if follower and bn is not None:
            _drop(follower, node)
        _fuse_what_follows(node, fused, modules)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _fuse_what_follows(node: fx.Node, fused: _Conv, modules: dict[str, nn.Module]) -> None:
    user = _only_user(node)
    if user is None:
        return
    if _is_relu(user, modules):
        fused.relu = True
        _drop(user, node)
        return
    relu = _only_user(user)
    if relu is None or not _is_add(user) or not _is_relu(relu, modules):
        return
    residual = next(argument for argument in user.args if argument is not node)
    # The fused node takes the addition's place: by then the residual has been computed.
    with node.graph.inserting_before(user):
        joined = node.graph.call_module(str(node.target), (node.args[0], residual))
    _drop(relu, joined)
    node.graph.erase_node(user)
    node.graph.erase_node(node)


def _drop(node: fx.Node, instead: fx.Node) -> None:
    node.replace_all_uses_with(instead)
    node.graph.erase_node(node)


def _pixels(conv: nn.Conv2d) -> list[int]:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise Unavailable("cuDNN's fused ops pad with zeros, by a number of pixels")
    return list(conv.padding)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(node: fx.Node, modules: dict[str, nn.Module], kind: type[Kind]) -> Kind | None:
    """The module a node calls, if it is exactly of that kind; a subclass may do anything."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, kind) and type(module) is kind else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return _module(node, modules, nn.ReLU) is not None
    return node.target in (F.relu, torch.relu, "relu", "relu_")


def _is_add(node: fx.Node) -> bool:
    two_tensors = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    return two_tensors and node.target in (operator.add, operator.iadd, torch.add, "add", "add_")


def _graphed(network: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """A CUDA graph over static buffers; copying inputs in and the output out is timed.

    A graph has addresses and keeps nothing alive: what runs has to keep the network, or its weights
    are freed and overwritten, and the answer is NaN (H200, torch 2.11).
    """
    static = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):  # cuDNN chooses its algorithms before the capture
            network(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        logits = network(static)

    def run(images: Tensor, _reads: object = network) -> Tensor:
        static.copy_(images)
        graph.replay()
        return logits.clone()

    return run
