"""Programs rewritten without torch's decompositions: the same operations, and no wrong answer where
tensors are written to in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels import build_engine
from resfuse.kernels.engine.frontend.functional_graph import functional_graph

Forward = Callable[[nn.Module, Tensor], Any]


class Layers(nn.Module):
    """Layers for a forward that is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.bare = nn.BatchNorm2d(16, affine=False, track_running_stats=False)
        self.drop, self.fc = nn.Dropout(), nn.Linear(16, 5)
        self.group, self.layer = nn.GroupNorm(4, 16), nn.LayerNorm(9)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def exported(forward: Forward) -> tuple[torch.export.ExportedProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        return torch.export.export(Layers(forward).eval(), (x,), strict=False), x


REWRITTEN: dict[str, Forward] = {
    "norms": lambda m, x: m.bare(m.norm(m.conv(x))),
    "activations in place": lambda m, x: F.hardtanh_(
        F.hardswish(F.silu(F.relu_(m.conv(x)), inplace=True), inplace=True), 0.0, 6.0
    ),
    "further activations": lambda m, x: F.hardsigmoid(
        F.elu_(F.leaky_relu_(m.conv(x), 0.2)).sigmoid_().tanh_(), inplace=True
    ),
    "arithmetic in place": lambda m, x: m.conv(x).add_(m.norm(m.conv(x))).mul_(2.0).sub_(1).div_(3),
    "a sum scaled in place": lambda m, x: m.conv(x).add_(m.conv(x), alpha=0.5),
    "broadcasting in place": lambda m, x: m.conv(x).mul_(m.conv(x).mean((2, 3), keepdim=True)),
    "dropout and a classifier": lambda m, x: m.fc(
        m.drop(torch.flatten(F.adaptive_avg_pool2d(m.conv(x), 1), 1))
    ),
    "a flatten of nothing": lambda m, x: torch.flatten(m.fc(m.conv(x).mean((2, 3))), 1),
    "reshapes": lambda m, x: m.conv(x).reshape(2, 4, 4, 81).view(2, 16, 9, 9).flatten(2),
    "shuffled channels": lambda m, x: (
        m.conv(x).view(2, 2, 8, 9, 9).transpose(1, 2).contiguous().view(2, 16, 9, 9)
    ),
    "contiguous already": lambda m, x: m.norm(m.conv(x).contiguous()),
    "chunks": lambda m, x: torch.cat(m.conv(x).chunk(3, dim=1)[::-1], 1),
    "chunks of images": lambda m, x: sum(m.conv(x).chunk(2)),
    "splits": lambda m, x: torch.cat(m.conv(x).split([4, 12], 1)[::-1], 1),
    "expanded": lambda m, x: m.conv(x) * m.conv(x).mean((2, 3), keepdim=True).expand_as(m.conv(x)),
    "reshaped as": lambda m, x: m.conv(x).flatten(2).reshape_as(m.conv(x)),
    "kept": lambda m, x: m.layer(
        F.pad(F.max_pool2d(m.group(m.conv(x)), 3, 1, 1), (1, 1))[..., 1:-1].softmax(1)
    ),
    "upsampled": lambda m, x: (
        F.interpolate(m.conv(x), scale_factor=2)
        + F.interpolate(m.conv(x), scale_factor=2, mode="bilinear")
    ),
    "attention": lambda m, x: F.scaled_dot_product_attention(*3 * [m.conv(x)]),
    "two outputs": lambda m, x: {"a": m.conv(x).relu_(), "b": [m.norm(m.conv(x)).flatten(1)]},
}  # fmt: skip


def operations(graph: fx.Graph) -> list[tuple[str, str]]:
    """Targets and arguments, nodes by their order. torch may leave a size of -1 to be found, and
    splits a tensor anew for each part."""
    numbers: dict[fx.Node, int] = {}
    splits: dict[tuple[str, str], int] = {}
    told: list[tuple[str, str]] = []
    for node in graph.nodes:
        args: Any = node.args
        if node.target is torch.ops.aten.view.default:
            args = (args[0], list(node.meta["val"].shape))
        said = str(fx.map_arg((args, dict(node.kwargs)), lambda arg: f"%{numbers[arg]}"))
        call = str(node.target), said
        if node.target is torch.ops.aten.split.Tensor and call in splits:
            numbers[node] = splits[call]
            continue
        numbers[node] = splits[call] = len(told)
        told.append(call)
    return told


@pytest.mark.parametrize("name", REWRITTEN)
def test_the_operations_are_those_of_torchs_decompositions(name: str) -> None:
    program, _ = exported(REWRITTEN[name])
    graph = functional_graph(program)
    assert graph is not None
    graph.lint()
    assert operations(graph) == operations(program.run_decompositions({}).graph)


def _of_one_tensor(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    z = y.relu_()  # y and z are one tensor from here on
    return y.add_(1.0) * z + m.drop(y).mul_(2.0) + z


def _written_after_it_was_read(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    before = m.norm(y)
    y.mul_(0.0)
    return before + y


def _dtypes(m: nn.Module, x: Tensor) -> Any:
    return m.conv(x).add_(m.conv(x).half())


def _view_written(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    y[:, 2:5].relu_()
    return y


def _base_written(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    part = y[:, :8]
    y.relu_()
    return torch.cat([part, y], 1)


def _part_written(m: nn.Module, x: Tensor) -> Any:
    one, other = m.conv(x).chunk(2, 1)
    one.mul_(other)
    return torch.cat([one, other], 1)


def _split_written(m: nn.Module, x: Tensor) -> Any:
    one, other = m.conv(x).split([4, 12], 1)
    one.mul_(other[:, :4])
    return torch.cat([one, other], 1)


def _unbound_written(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    y.unbind(1)[3].relu_()
    return y


def _split_base_written(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    part = y.split(8, 1)[0]
    y.relu_()
    return part + 1


def _reshaped_written(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    y.flatten(1).sigmoid_()
    return y


def _contiguous_written(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    y.contiguous().tanh_()  # y itself
    return y


def _same_shape_written(m: nn.Module, x: Tensor) -> Any:
    y = m.conv(x)
    y.reshape(2, 16, 9, 9).relu_()
    return y


WRITING: dict[str, Forward] = {
    name.strip("_"): forward
    for name, forward in globals().copy().items()
    if name.startswith("_") and callable(forward) and forward.__module__ == __name__
}
LEFT_TO_TORCH = {
    "dtypes", "view_written", "base_written", "part_written", "reshaped_written",
    "split_written", "unbound_written", "split_base_written",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITING)
def test_what_is_written_to_in_place_is_read_as_eager_reads_it(name: str) -> None:
    program, x = exported(WRITING[name])
    assert (functional_graph(program) is None) == (name in LEFT_TO_TORCH)
    torch.manual_seed(0)
    model = Layers(WRITING[name]).eval()
    with torch.no_grad():
        want, y = model(x), build_engine(model, x)(x)
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: m.conv(x.relu_()), lambda m, x: m.conv(x) + m.norm.running_mean.add_(1.0).sum()],
)
def test_writes_to_the_input_and_to_buffers_are_torchs_to_report(forward: Forward) -> None:
    program, x = exported(forward)
    assert functional_graph(program) is None
    with pytest.raises(ValueError, match=r"^argument model: .* accepted: models that only compute"):
        build_engine(Layers(forward).eval(), x)


def test_norms_and_dropout_in_training_are_left_to_torch() -> None:
    for forward in (
        lambda m, x: F.dropout(m.conv(x), 0.5, True),
        lambda m, x: F.batch_norm(
            m.conv(x), m.norm.running_mean, m.norm.running_var, training=True
        ),
    ):
        assert functional_graph(exported(forward)[0]) is None
