"""What people do to models and engines, each done to the engine and to the plain model: the same
answer, or a refusal in one sentence that says what to do.
"""

import copy
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.ops
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from engine_fuzz import Saved
from engine_models import conv, images, made
from graphs import error
from resfuse.kernels import Engine, build_engine
from resfuse.kernels.engine.load import load_engine
from scope import Scope

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]

AS_EAGER = 2e-6
SHAPE = (2, 3, 9, 10)


def scope(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Scope(forward, **{name: part() for name, part in parts.items()})


@torch.no_grad()
def require_same(engine: Engine, model: nn.Module, x: Tensor) -> None:
    for got, want in zip(tree_leaves(engine(x)), tree_leaves(model(x)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.equal(got.isfinite(), want.isfinite())
        if got.is_floating_point():
            assert error(got[got.isfinite()], want[want.isfinite()]) < AS_EAGER
        else:
            assert torch.equal(got, want)


# Linear layers over the last of several dimensions

LINEAR: dict[str, Callable[[], nn.Module]] = {
    "pixels": scope(
        lambda s, x: s.l(s.c(x).permute(0, 2, 3, 1)), c=conv, l=lambda: nn.Linear(16, 8)
    ),
    "pixels and back": scope(
        lambda s, x: s.l(s.n(s.c(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
        c=conv, l=lambda: nn.Linear(16, 8), n=lambda: nn.LayerNorm(16),
    ),
    "a map's width": scope(lambda s, x: s.l(s.c(x)), c=conv, l=lambda: nn.Linear(10, 7)),
    "maps of one pixel": scope(
        lambda s, x: s.l(s.c(x).mean((2, 3), keepdim=True)), c=conv, l=lambda: nn.Linear(1, 3)
    ),
    "tokens": scope(
        lambda s, x: s.l(s.c(x).flatten(2).transpose(1, 2)), c=conv, l=lambda: nn.Linear(16, 5)
    ),
    "five dimensions": scope(
        lambda s, x: s.l(s.c(x).unflatten(3, (2, 5)).transpose(1, 4)),
        c=conv, l=lambda: nn.Linear(16, 5),
    ),
    "a table": scope(
        lambda s, x: s.c(x) + s.l(torch.ones(1, 5, 5, 2)).mean((1, 2)).view(1, 16, 1, 1),
        c=conv, l=lambda: nn.Linear(2, 16),
    ),
    "a weight of one dimension": scope(
        lambda s, x: F.linear(s.c(x).mean((2, 3)), s.n.weight), c=conv, n=lambda: nn.LayerNorm(16)
    ),
    "a flattened map": scope(
        lambda s, x: s.l(s.c(x).flatten(1)), c=conv, l=lambda: nn.Linear(16 * 90, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_over_maps(name: str, timings: Path) -> None:
    model = made(LINEAR[name])
    require_same(
        build_engine(model, images(*SHAPE), timings=timings), model, images(*SHAPE, seed=3)
    )


# Operators of other packages, and operators that do not take any numbers


def gram(y: Tensor) -> Tensor:
    return y.flatten(2) @ y.flatten(2).transpose(1, 2) + torch.eye(y.shape[1])


PARTICULAR: dict[str, Callable[[], nn.Module]] = {
    "deformable convolution": scope(
        lambda s, x: s.d(x, s.o(x)), o=lambda: nn.Conv2d(3, 18, 3, padding=1),
        d=lambda: torchvision.ops.DeformConv2d(3, 8, 3, padding=1),
    ),
    "cholesky": scope(lambda s, x: torch.linalg.cholesky(gram(s.c(x))), c=conv),
    "gather of one": scope(
        lambda s, x: (y := s.c(x).flatten(1)[:, :1]).gather(1, (y * 0).long()), c=conv
    ),
    "embedding of one": scope(
        lambda s, x: s.e(s.c(x).mean((2, 3)).argmax(1) * 0), c=conv, e=lambda: nn.Embedding(1, 4)
    ),
    "one hot": scope(lambda s, x: F.one_hot((s.c(x).mean((2, 3)) > 9).long(), 2), c=conv),
    "cross entropy": scope(
        lambda s, x: F.binary_cross_entropy(s.c(x).sigmoid(), torch.ones(2, 16, 9, 10)), c=conv
    ),
    "a mask of what is large": scope(
        lambda s, x: (y := s.c(x)).masked_fill(y > 0.1, -torch.inf).flatten(1).softmax(-1), c=conv
    ),
    "logit": scope(lambda s, x: torch.logit(s.c(x).sigmoid() * 0.9 + 0.01), c=conv),
    "acos": scope(lambda s, x: torch.acos(s.c(x).tanh() * 0.9), c=conv),
    "orthogonal": lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(conv()), nn.BatchNorm2d(16), nn.ReLU()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTICULAR)
def test_operators_that_take_particular_numbers(name: str, timings: Path) -> None:
    model = made(PARTICULAR[name])
    engine = build_engine(model, images(*SHAPE), timings=timings)
    require_same(engine, model, images(*SHAPE, seed=3))


def test_what_is_not_tried_is_said_to_be(timings: Path) -> None:
    engine = build_engine(made(PARTICULAR["acos"]), images(*SHAPE), timings=timings)
    assert "Neither timed nor checked: 1" in engine.explain()


def test_random_numbers_are_drawn_at_every_call(timings: Path) -> None:
    model = made(scope(lambda s, x: torch.bernoulli(s.c(x).sigmoid()), c=conv))
    engine = build_engine(model, images(*SHAPE), timings=timings)
    x = images(*SHAPE)
    first, second = engine(x), engine(x)
    assert set(first.unique().tolist()) == {0.0, 1.0} and not torch.equal(first, second)


@torch.library.custom_op("resfuse_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_of_ones_own_runs_and_is_loaded_by_name(timings: Path, tmp_path: Path) -> None:
    model = made(scope(lambda s, x: doubled(s.c(x)).relu(), c=conv))
    engine, x = build_engine(model, images(*SHAPE), timings=timings), images(*SHAPE)
    require_same(engine, model, x)
    engine.save(tmp_path / "own.engine")
    name = "resfuse_tests.doubled.default"
    with pytest.raises(ValueError, match=rf"{name} is not known to only compute.*allow="):
        load_engine(tmp_path / "own.engine")
    assert torch.equal(load_engine(tmp_path / "own.engine", allow=[name])(x), engine(x))


# The engine's weights are its own


def mixed() -> nn.Module:
    """Native steps, torch's operations and a slope."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.PReLU(16), nn.GroupNorm(4, 16),
        nn.ConvTranspose2d(16, 4, 2),
    )  # fmt: skip


@torch.no_grad()
def train_on(model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.mul_(1.5)


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("batch", [2, 5])
def test_a_model_that_trains_on_changes_nothing(
    batch: int, keep_weights: bool, timings: Path
) -> None:
    model, x = made(mixed), images(batch, *SHAPE[1:])
    engine = build_engine(
        model, images(*SHAPE), other_batches="eager", keep_weights=keep_weights, timings=timings
    )
    before = engine(x)
    train_on(model)
    assert torch.equal(engine(x), before)
    with torch.no_grad():
        assert error(model(x), before) > 0.1


def test_save_writes_the_weights_that_run(timings: Path, tmp_path: Path) -> None:
    model, x = made(mixed), images(*SHAPE)
    engine = build_engine(model, x, timings=timings)
    before = engine(x)
    train_on(model)
    engine.save(tmp_path / "mixed.engine")
    assert torch.equal(load_engine(tmp_path / "mixed.engine")(x), before)


def test_what_was_loaded_by_refresh_may_train_on(timings: Path) -> None:
    other, x = made(mixed), images(5, *SHAPE[1:])
    train_on(other)
    engine = build_engine(made(mixed), images(*SHAPE), other_batches="eager", timings=timings)
    engine.refresh(dict(other.named_parameters()) | dict(other.named_buffers()))
    before = engine(x), engine(x[:2])
    require_same(engine, other, x)
    train_on(other)
    assert torch.equal(engine(x), before[0]) and torch.equal(engine(x[:2]), before[1])


def test_tied_weights_are_copied_once(timings: Path) -> None:
    def tied() -> nn.Module:
        model = Scope(lambda s, x: s.b(s.a(x)), a=nn.ConvTranspose2d(3, 3, 33), b=nn.Identity())
        model.b = nn.ConvTranspose2d(3, 3, 33)
        model.b.weight = model.a.weight
        return model

    model = made(tied)
    engine = build_engine(model, images(1, 3, 4, 4), timings=timings)
    require_same(engine, model, images(1, 3, 4, 4))
    assert engine.memory().originals_bytes < 1.5 * 4 * 9 * 33 * 33


# Answers


def test_answers_go_into_a_head_that_is_trained(timings: Path) -> None:
    model, head, x = made(mixed), nn.Conv2d(4, 2, 1), images(*SHAPE)
    for other_batches, batch in (("error", 2), ("eager", 3), ("pad", 1)):
        engine = build_engine(
            model,
            x,
            other_batches=other_batches,
            timings=timings,  # type: ignore[arg-type]
        )
        head.zero_grad()
        head(engine(images(batch, *SHAPE[1:]))).sum().backward()
        assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def engine(timings: Path) -> Engine:
    return build_engine(made(mixed), images(*SHAPE), timings=timings)


TRANSFORMS: dict[str, Callable[[Engine, Tensor], Any]] = {
    "vmap": lambda e, x: torch.vmap(e)(x[None]),
    "gradients": lambda e, x: torch.func.grad(lambda x: e(x).sum())(x),
    "jvp": lambda e, x: torch.func.jvp(e, (x,), (x,)),
    "make_fx": lambda e, x: torch.fx.experimental.proxy_tensor.make_fx(e)(x),
    "fake tensors": lambda e, x: e(torch._subclasses.FakeTensorMode().from_tensor(x)),
    "a subclass": lambda e, x: e(x.as_subclass(type("Image", (Tensor,), {}))),
    "export": lambda e, x: torch.export.export(Scope(lambda s, x: e(x)), (x,), strict=False),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_records_or_transforms_is_refused(name: str, engine: Engine) -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match="argument x: "):
        warnings.simplefilter("ignore")
        TRANSFORMS[name](engine, images(*SHAPE))


def test_fake_tensor_mode_is_refused(engine: Engine) -> None:
    x = images(*SHAPE)
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match="argument x: "):
        engine(x)


# Infinite and broken weights


class Masked(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.c = conv()
        mask = torch.full((90, 90), -torch.inf).triu(1)
        if kind == "parameter":
            self.mask: Tensor = nn.Parameter(mask, requires_grad=False)
        else:
            self.register_buffer("mask", mask, persistent=kind == "persistent")

    def forward(self, x: Tensor) -> Tensor:
        t = self.c(x).flatten(2).transpose(1, 2)
        return (t @ t.transpose(1, 2) + self.mask).softmax(-1) @ t


@pytest.mark.parametrize("kind", ["persistent", "not persistent", "parameter"])
def test_masks_of_infinity(kind: str, timings: Path, tmp_path: Path) -> None:
    model, x = made(lambda: Masked(kind)), images(*SHAPE)
    engine = build_engine(model, x, timings=timings)
    engine.refresh(model.state_dict())
    require_same(engine, model, x)
    engine.save(tmp_path / "masked.engine")
    require_same(load_engine(tmp_path / "masked.engine"), model, x)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "2.weight"])
def test_what_would_be_folded_must_be_finite(number: float, name: str, timings: Path) -> None:
    model = made(mixed)
    model.state_dict()[name].view(-1)[0] = number
    with pytest.raises(
        ValueError, match=f"argument model: {name} holds values that are not finite"
    ):
        build_engine(model, images(*SHAPE), timings=timings)


@pytest.mark.parametrize("variance", [-1.0, -1e-5])
def test_a_variance_below_zero_is_refused(variance: float, timings: Path) -> None:
    model = made(mixed)
    model.get_buffer("1.running_var")[3] = variance
    with pytest.raises(ValueError, match=r"1\.running_var holds variances"):
        build_engine(model, images(*SHAPE), timings=timings)


# Refresh

NO_STATE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a module": (lambda m: m, "Sequential; accepted: what model.state_dict"),
    "None": (lambda m: None, "NoneType; accepted"),
    "a list": (lambda m: list(m.state_dict().items()), "list; accepted"),
    "arrays": (lambda m: {k: v.numpy() for k, v in m.state_dict().items()}, "is ndarray; accepted"),
    "a checkpoint": (lambda m: {"state_dict": m.state_dict()}, "'state_dict' may hold"),
    "prefixes": (lambda m: {f"module.{k}": v for k, v in m.state_dict().items()}, "is missing"),
    "sparse": (
        lambda m: {k: v.to_sparse() for k, v in m.state_dict().items()}, "is torch.sparse_coo",
    ),
    "meta": (lambda m: m.to("meta").state_dict(), "on meta, which has no numbers"),
    "fake": (
        lambda m: {k: torch._subclasses.FakeTensorMode().from_tensor(v)
                   for k, v in m.state_dict().items()}, "accepted: dense tensors",
    ),
    "complex": (
        lambda m: {k: v.to(torch.complex64) for k, v in m.state_dict().items()}, "torch.complex64",
    ),
    "quantized": (
        lambda m: {k: torch.quantize_per_tensor(v.float(), 0.1, 0, torch.qint8)
                   for k, v in m.state_dict().items()}, "a quantized tensor",
    ),
    "out of range": (
        lambda m: {k: v.double() * 1e200 for k, v in m.state_dict().items()}, "not finite",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", NO_STATE)
def test_refresh_refuses_before_anything_changes(name: str, engine: Engine) -> None:
    make, said = NO_STATE[name]
    x = images(*SHAPE)
    before = engine(x)
    with pytest.raises(ValueError, match=f"argument state_dict: .*{said}") as refusal:
        engine.refresh(make(made(mixed)))
    assert "\n" not in str(refusal.value)
    assert torch.equal(engine(x), before)


@pytest.mark.parametrize("change", [
    lambda state: {k: v.double() for k, v in state.items()},
    lambda state: state | {"more": torch.ones(1)},
    lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    lambda state: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
])  # fmt: skip
def test_refresh_takes_what_load_state_dict_would(change: Any, timings: Path) -> None:
    other, x = made(mixed), images(*SHAPE)
    train_on(other)
    engine = build_engine(made(mixed), x, timings=timings)
    engine.refresh(change(other.state_dict()))
    require_same(engine, other, x)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps,
                                 lambda e: torch.save(e, "/dev/null")])  # fmt: skip
def test_copies_name_what_to_do_instead(how: Callable[[Engine], Any], engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"an engine cannot be copied or pickled: .*engine\.save"):
        how(engine)


# Forks


def answer(engine: Engine, x: Tensor, threads: int | None, queue: Any) -> None:
    if threads:
        torch.set_num_threads(threads)
    queue.put(engine(x).sum().item())


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads", [None, 1])
@pytest.mark.parametrize("held", [False, True])
def test_a_forked_process_answers(threads: int | None, held: bool, timings: Path) -> None:
    """It has none of its parent's threads, the one that held the lock at the fork included."""
    model, x = (
        made(lambda: nn.Sequential(conv(3, 64), nn.ReLU(), conv(64, 64))),
        images(2, 3, 64, 64),
    )
    engine = build_engine(model, x, timings=timings)
    want = engine(x).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=answer, args=(engine, x, threads, queue))
    if held:
        engine._lock.acquire()
    child.start()
    if held:
        engine._lock.release()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs and child.exitcode == 0
    assert queue.get(timeout=10) == pytest.approx(want, rel=1e-4)
    assert engine(x).sum().item() == pytest.approx(want, rel=1e-4)


# Padded batches


def after(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    model = Scope(lambda s, x: forward(s, s.c(x)), c=nn.Conv2d(3, 8, 1))
    model.token = nn.Parameter(torch.randn(1, 1, 8))
    return model


def in_windows(y: Tensor) -> Tensor:
    y = y.view(-1, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8).softmax(1)
    return y.reshape(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)


def tokens_of(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


APART: dict[str, Callable[[Any, Tensor], Any]] = {
    "maps and rows": lambda s, y: {"a": y, "b": [y.mean((2, 3))]},
    "boxes of all images": lambda s, y: y.permute(0, 2, 3, 1).reshape(-1, 4),
    "time first": lambda s, y: y.mean(2).permute(2, 0, 1),
    "a token": lambda s, y: torch.cat([s.token.expand(y.shape[0], -1, -1), tokens_of(y)], 1),
    "attention": lambda s, y: F.scaled_dot_product_attention(*[tokens_of(y)] * 3),
    "products": lambda s, y: torch.bmm(y.flatten(2), tokens_of(y)),
    "windows": lambda s, y: in_windows(y),
    "stacked": lambda s, y: torch.stack([y, 2 * y], 0),
    "channels in another order": lambda s, y: y[:, torch.arange(7, -1, -1)],
    "a layer norm over all but the batch": lambda s, y: F.layer_norm(y, y.shape[1:]),
    "ones of the batch": lambda s, y: y * torch.ones(y.shape[0], 1, 1, 1),
}
TOGETHER: dict[str, Callable[[Any, Tensor], Any]] = {
    "a number": lambda s, y: y.mean(),
    "similarities": lambda s, y: (z := y.mean((2, 3))) @ z.T,
    "einsum": lambda s, y: torch.einsum("nc,mc->nm", y.mean((2, 3)), y.mean((2, 3))),
    "softmax": lambda s, y: y.softmax(0),
    "centred": lambda s, y: y - y.mean(0),
    "statistics": lambda s, y: F.batch_norm(y, None, None, training=True),
    "frames of a clip": lambda s, y: y.mean((2, 3)).view(-1, 2, 8).mean(1),
    "the norm of all": lambda s, y: y / y.norm(),
    "the first": lambda s, y: y - y[:1],
    "flipped": lambda s, y: y.flip(0),
    "sorted": lambda s, y: y.sort(0)[0],
    "added up": lambda s, y: y.cumsum(0),
    "behind each other": lambda s, y: torch.cat([y, 2 * y], 0),
    "repeated": lambda s, y: y.repeat(2, 1, 1, 1),
    "batch in channels": lambda s, y: F.avg_pool2d(y.transpose(0, 1), 2).transpose(0, 1),
    "divided by the size": lambda s, y: y / y.shape[0],
    "a number made of the size": lambda s, y: y * torch.ones(y.shape[0]).sum(),
    "by position": lambda s, y: y + torch.arange(y.shape[0]).view(-1, 1, 1, 1),
    "a branch": lambda s, y: 2 * y if y.shape[0] > 2 else y,
    "a branch for one": lambda s, y: 2 * y if y.shape[0] == 1 else y,
    "squeezed": lambda s, y: y.mean((2, 3)).squeeze(),
    "as many rows as images": lambda s, y: y[:, :, : y.shape[0]],
}


@pytest.mark.parametrize("name", APART)
def test_padding_changes_nothing(name: str, timings: Path, tmp_path: Path) -> None:
    model = made(lambda: after(APART[name]))
    engine = build_engine(model, images(4, 3, 8, 8), other_batches="pad", timings=timings)
    engine.save(tmp_path / "padded.engine")
    for batch in (1, 2, 3, 4):
        x = images(batch, 3, 8, 8)
        require_same(engine, model, x)
        require_same(load_engine(tmp_path / "padded.engine"), model, x)


@pytest.mark.parametrize("name", TOGETHER)
def test_padding_is_refused_where_it_is_not_proved(name: str, timings: Path) -> None:
    model = made(lambda: after(TOGETHER[name]))
    with pytest.raises(ValueError, match="argument other_batches: 'pad' is not possible") as why:
        build_engine(model, images(4, 3, 8, 8), other_batches="pad", timings=timings)
    assert "\n" not in str(why.value)


def test_the_output_that_cannot_be_padded_is_named(timings: Path) -> None:
    model = made(lambda: after(lambda s, y: (y, y.mean())))
    with pytest.raises(ValueError, match="output 1: mean goes across the images of a batch"):
        build_engine(model, images(4, 3, 8, 8), other_batches="pad", timings=timings)


# A file from a stranger: what the fuzzer would find rarely


def rewritten(engine: Engine, path: Path, change: Callable[[Any], object]) -> Path:
    engine.save(path)
    saved = Saved(path)
    change(saved.told)
    saved.write(path, renewed=True)
    return path


def graph_in(told: Any) -> Any:
    (plan,) = told["plans"].values()
    return plan["graph"]


FORGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "an operation that reads memory": (
        lambda t: graph_in(t)["nodes"][-1].update(target="aten.as_strided.default"),
        "as_strided.default is not known to only compute",
    ),
    "a result of a type to import": (
        lambda t: graph_in(t).update(
            spec='[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
        ),
        "made up of collections.defaultdict",
    ),
    "a spec without an end": (
        lambda t: graph_in(t).update(spec="[" * 100_000), "made up of nothing",
    ),
    "a map of terabytes": (
        lambda t: graph_in(t)["values"]["input"].update(shape=[2, 3, 10**6, 10**6]),
        "larger than this machine's memory",
    ),
    "another device's facts left out": (
        lambda t: t["environment"].pop("native"), "was built with native None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_files(name: str, engine: Engine, tmp_path: Path) -> None:
    change, said = FORGED[name]
    with pytest.raises(ValueError, match=f"argument path: .*{said}"):
        load_engine(rewritten(engine, tmp_path / "forged.engine", change))


def test_a_bit_of_the_weights_is_found(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "mixed.engine"
    engine.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its digest"):
        load_engine(path)
