"""Tools that look into a fused model, and tools that make another model of it."""

import copy
import cProfile
import io
import pickle
import pstats
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.resnet import BasicBlock, ResNet

from hostile import Block, images, is_fused, pair_of, plans_run, require_alike, require_same, spread
from resfuse.kernels import explain, fuse, unfuse

pytestmark = pytest.mark.slow


def network() -> nn.Module:
    """ResNet-18 with one block in all stages but the last."""
    torch.manual_seed(0)
    return spread(ResNet(BasicBlock, [1, 1, 1, 2], num_classes=5))


PHOTO = images(shape=(1, 3, 40, 33))


# Hooks on all modules, and modes


@pytest.mark.parametrize(
    "register",
    [
        lambda seen: modules.register_module_forward_hook(
            lambda m, a, y: seen.append(type(m).__name__)
        ),
        lambda seen: modules.register_module_forward_pre_hook(
            lambda m, a: seen.append(type(m).__name__)
        ),
        lambda seen: modules.register_module_full_backward_hook(lambda *_: None),
    ],
)
def test_hooks_on_all_modules_see_them(register: Any) -> None:
    model, fused = network(), fuse(network())
    counts = []
    for one in (model, fused):
        seen: list[str] = []
        handle = register(seen)
        with torch.no_grad():
            y = one(PHOTO)
        handle.remove()
        counts.append((len(seen), y))
    assert counts[0][0] == counts[1][0]
    require_same(counts[1][1], counts[0][1])
    assert plans_run(fused, PHOTO) > 0


def test_a_hook_on_all_modules_changes_what_they_get() -> None:
    plain, fused = pair_of(Block)
    handle = modules.register_module_forward_pre_hook(
        lambda m, args: (args[0] * 0,) if isinstance(m, nn.ReLU) else None
    )
    try:
        require_alike(plain, fused)
    finally:
        handle.remove()
    require_alike(plain, fused)


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Operators])
def test_modes_see_every_call(mode: Any) -> None:
    plain, fused = pair_of(Block)
    seen = []
    for model in (plain, fused):
        with torch.no_grad(), mode() as watching:
            model(images())
        seen.append(watching.calls)
    assert seen[0] == seen[1]


def test_a_default_device_is_no_mode_that_looks() -> None:
    plain, fused = pair_of(Block)
    with torch.device("cpu"):
        require_alike(plain, fused)
        assert plans_run(fused) == 1


def test_vmap_grad_and_forward_mode() -> None:
    plain, fused = pair_of(lambda: Block().requires_grad_(False))
    stacked = torch.stack([images(1), images(2)])
    require_same(torch.vmap(fused)(stacked), torch.vmap(plain)(stacked))
    require_same(*[torch.func.grad(lambda x, m=m: m(x).sum())(images()) for m in (fused, plain)])
    require_same(*[torch.func.jvp(m, (images(),), (images(2),)) for m in (fused, plain)])


def test_a_patched_call_sees_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = pair_of(Block)
    seen: list[str] = []
    call = nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, *a: seen.append(type(self).__name__) or call(self, *a)
    )
    require_alike(plain, fused, runs=1)
    assert len(seen) == 8


# torch.fx and torch.jit


def test_fx_traces_the_original() -> None:
    model, fused = network(), fuse(network())
    names = get_graph_node_names(fused), get_graph_node_names(model)
    assert names[0] == names[1]
    traced = fx.symbolic_trace(fused)
    require_alike(model, traced, PHOTO)
    require_alike(model, fuse(traced.eval()), PHOTO)
    extractor = create_feature_extractor(fused, {"layer2": "a", "layer4.1.relu": "b"})
    require_alike(
        create_feature_extractor(model, {"layer2": "a", "layer4.1.relu": "b"}).eval(),
        extractor.eval(), PHOTO,
    )  # fmt: skip


def test_fuse_fx_of_a_fused_model() -> None:
    from torch.ao.quantization.quantize_fx import fuse_fx

    model, fused = network(), fuse(network())
    require_alike(model, fuse_fx(fused), PHOTO)


def test_scripting_says_unfuse() -> None:
    fused = fuse(network())
    for model in (fused, nn.Sequential(fused)):
        with pytest.raises(RuntimeError, match="unfuse"):
            torch.jit.script(model)
    require_alike(network(), torch.jit.script(unfuse(fused)), PHOTO)


def test_export_and_its_module() -> None:
    model = network()
    program = torch.export.export(fuse(model), (PHOTO,)).module()
    require_alike(model, program, PHOTO)


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _saved,
    "fuse": fuse,
    "unfuse": lambda m: unfuse(copy.deepcopy(m)),
    "fx again": lambda m: fx.symbolic_trace(m).eval(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [network, lambda: fx.symbolic_trace(network()).eval()])
def test_copies_of_fused_models(make: Any, how: str) -> None:
    plain = make()
    fused = fuse(plain)
    require_alike(plain, fused, PHOTO)
    other = COPIES[how](fused)
    assert [m.training for m in other.modules() if not list(m.children())] == [
        m.training for m in plain.modules() if not list(m.children())
    ]
    require_alike(plain, other, PHOTO)
    if how not in ("copy", "unfuse", "fx again"):
        assert is_fused(other)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        require_alike(unfuse(copy.deepcopy(other)), other, PHOTO)
        require_alike(plain, fused, PHOTO)


def test_feature_extractors_change_their_mode() -> None:
    model = network()
    extractor = create_feature_extractor(model, {"layer3": "a", "fc": "b"}).eval()
    fused = fuse(extractor)
    assert not fused.training and plans_run(fused, PHOTO) > 0
    require_alike(extractor, fused, PHOTO)
    fused = fuse(extractor, inplace=True)
    for _ in range(2):
        fused.train()
        assert fused.training
        fused.eval()
        plain = create_feature_extractor(network(), {"layer3": "a", "fc": "b"}).eval()
        require_alike(plain, fused, PHOTO)
        assert plans_run(fused, PHOTO) > 0


def test_a_graph_that_is_edited() -> None:
    plain, fused = (fx.symbolic_trace(network()).eval() for _ in range(2))
    fuse(fused, inplace=True)
    require_alike(plain, fused, PHOTO)
    for model in (plain, fused):
        (pool,) = (node for node in model.graph.nodes if node.target == "maxpool")
        pool.replace_all_uses_with(pool.args[0])
        model.graph.erase_node(pool)
        model.recompile()
    require_alike(plain, fused, PHOTO)
    assert plans_run(fused, PHOTO) > 0


def test_data_parallel_replicas_are_not_the_model() -> None:
    plain, fused = pair_of(Block)
    replica = fused._replicate_for_data_parallel()
    replica._modules, replica._parameters = dict(fused._modules), dict(fused._parameters)
    require_alike(plain, replica)
    assert plans_run(replica) == 0


def test_compiled_inner_modules_are_called() -> None:
    plain, fused = pair_of(lambda: nn.Sequential(Block(), Block()))
    calls: list[Any] = []
    for model in (plain, fused):
        block = model[1]
        block._compiled_call_impl = lambda x, block=block: calls.append(1) or block.forward(x)
    require_alike(plain, fused, runs=1)
    assert len(calls) == 2


# explain tells the truth


@pytest.mark.parametrize(
    "model, words",
    [
        (nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)), "1 Conv3d left"),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()), "1 Conv1d left"),
        (nn.Sequential(nn.Linear(3, 8)), "no 2-D convolution"),
    ],
)
def test_what_is_not_read_is_named(model: nn.Module, words: str) -> None:
    assert words in explain(model).summary()


class Video(nn.Module):
    """A 2-D convolution and a 3-D one, whose weight no channels_last fits."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv3d = Block(), nn.Conv3d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3d(self.block(x).unsqueeze(1))


def test_an_example_checks_a_model_with_weights_of_five_dimensions() -> None:
    plain = Video().eval()
    x = images()
    with torch.no_grad():
        require_alike(plain, fuse(plain, x))


def test_torchscript_is_named() -> None:
    scripted = torch.jit.trace(Block().eval(), images())
    assert "TorchScript" in explain(scripted).summary()
    require_alike(scripted, fuse(nn.Sequential(scripted)))


def test_lazy_layers_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"argument model: 0 has no weights yet"):
        fuse(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()))


def test_a_model_is_not_touched_by_explain() -> None:
    model: Any = network().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    explain(model, PHOTO)
    assert [type(m) for m in model.modules()] == kinds
    for module, before in zip(model.modules(), attributes, strict=True):
        assert list(vars(module)) == list(before)
        assert all(vars(module)[name] is value for name, value in before.items())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_an_output_is_a_plain_tensor() -> None:
    fused = pair_of(Block)[1]
    with torch.inference_mode():
        assert type(fused(images())) is Tensor


# Profilers that run while a model is fused: capture has a profile function of its own


def test_cprofile_goes_on_after_fuse_and_the_model_is_fused() -> None:
    plain = spread(Block())
    with cProfile.Profile() as profiler:
        fused = fuse(plain)
        assert sys.getprofile() in (profiler, None)  # None: since Python 3.12 it is no function
        require_alike(plain, fused)
    assert is_fused(fused)
    assert {type(module).__module__ for module in plain.modules()} == {
        type(module).__module__ for module in spread(Block()).modules()
    }
    assert "forward" in {name for _, _, name in pstats.Stats(profiler).stats}  # type: ignore[attr-defined]


def test_a_profile_function_goes_on_after_fuse() -> None:
    seen: list[str] = []

    def profile(*_: Any) -> None:
        seen.append("")

    sys.setprofile(profile)
    try:
        fused = fuse(spread(Block()))
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert is_fused(fused) and seen


def test_a_profiler_that_cannot_be_paused_leaves_the_model_unfused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = spread(Block())
    monkeypatch.setattr(sys, "getprofile", object)  # as of other profilers written in C
    fused = fuse(plain)
    assert "while a profiler ran" in str(explain(fused))
    monkeypatch.undo()
    require_alike(plain, fused)
