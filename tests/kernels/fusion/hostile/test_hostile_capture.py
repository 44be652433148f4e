"""What a capture would bake into an engine: values that a forward changes, answers to questions
about memory, torch's defaults. It is refused, or takes no other input; the model is as it was.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from engine_fuzz import Saved
from engine_models import conv, images, made
from graphs import error
from resfuse.kernels import Engine, build_engine
from resfuse.kernels.engine.load import load_engine
from scope import Scope

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 9, 10)
CALLS = 0
COUNTS: Counter[str] = Counter()
NUMBERS = itertools.count()


class Options:
    def __init__(self) -> None:
        self.calls = 0


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Net(nn.Module):
    total = 0
    table: ClassVar[dict[str, int]] = {}

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.act = conv(), act
        self.calls, self.first, self.last = 0, True, None
        self.kept: list[Any] = []
        self.cache: dict[str, Any] = {"deep": {}}
        self.options, self.slotted, self.tensor = Options(), Slotted(), torch.ones(1)
        self.shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, self.conv(x))


def count(s: Any, y: Tensor) -> Tensor:
    s.calls += 1
    return y * s.calls


def count_globally(s: Any, y: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return y * CALLS


def count_in_class(s: Any, y: Tensor) -> Tensor:
    type(s).total += 1
    return y * s.total


def count_in_object(s: Any, y: Tensor) -> Tensor:
    s.options.calls += 1
    return y * s.options.calls


def count_in_slot(s: Any, y: Tensor) -> Tensor:
    s.slotted.calls += 1
    return y * s.slotted.calls


def append(s: Any, y: Tensor) -> Tensor:
    s.kept.append(1)
    return y * len(s.kept)


def enter(s: Any, y: Tensor) -> Tensor:
    s.cache["deep"]["n"] = s.cache["deep"].get("n", 0) + 1
    return y * s.cache["deep"]["n"]


def enter_in_class(s: Any, y: Tensor) -> Tensor:
    s.table["n"] = s.table.get("n", 0) + 1
    return y * s.table["n"]


def enter_globally(s: Any, y: Tensor) -> Tensor:
    COUNTS["n"] += 1
    return y * COUNTS["n"]


def first_only(s: Any, y: Tensor) -> Tensor:
    if s.first:
        s.first = False
        return 2 * y
    return y


def running_mean(s: Any, y: Tensor) -> Tensor:
    s.tensor = s.tensor * 0.5 + y.mean()
    return y + s.tensor


def write(s: Any, y: Tensor) -> Tensor:
    s.tensor.add_(1)
    return y * s.tensor


def enclosing() -> Callable[[Any, Tensor], Tensor]:
    calls = 0

    def act(s: Any, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return y * calls

    return act


def keep(s: Any, y: Tensor) -> Tensor:
    s.last = y
    return y


def number_next(s: Any, y: Tensor) -> Tensor:
    return y * next(NUMBERS)


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "an attribute": (count, r"Net changes self\.calls in its forward; an engine would answer"),
    "a global": (count_globally, "Net changes the global CALLS"),
    "a class": (count_in_class, r"Net changes Net\.total"),
    "an object": (count_in_object, r"Net changes self\.options"),
    "a slot": (count_in_slot, r"Net changes a Slotted\.calls"),
    "a list": (append, r"Net changes self\.kept"),
    "a dict in a dict": (enter, r"Net changes self\.cache"),
    "a dict of the class": (enter_in_class, r"Net changes Net\.table"),
    "a global counter": (enter_globally, "Net changes the global COUNTS"),
    "a flag at the first call": (first_only, r"Net changes self\.first"),
    "a tensor each time": (running_mean, r"Net changes self\.tensor"),
    "a tensor in place": (write, "Net cannot be exported: .*mutated"),
    "an enclosing function": (enclosing(), "Net changes a variable of an enclosing function"),
    "what it computed": (keep, r"Net changes self\.last"),
    "Python's random numbers": (
        lambda s, y: y * random.random(), "Net draws random numbers outside of torch",
    ),
    "an iterator": (number_next, "the global NUMBERS holds a count, which changes when it is read"),
}  # fmt: skip


def state(model: nn.Module) -> list[Any]:
    """Everything that CHANGES change, and which objects they are."""
    s: Any = model
    told = [s.calls, s.first, s.last, s.kept, s.cache, s.options.calls, s.slotted.calls, s.shape]
    told += [Net.total, Net.table, CALLS, dict(COUNTS), repr(NUMBERS), random.getstate()]
    told += [s.tensor.item(), [id(v) for v in (s.kept, s.cache, s.cache["deep"], s.tensor)]]
    told += [sorted(vars(model)), [len(m._forward_hooks) for m in model.modules()]]
    return [repr(item) for item in told]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_changes_is_refused_and_undone(
    name: str, inside: bool, timings: Path
) -> None:
    act, said = CHANGES[name]
    net = made(lambda: Net(act))
    model = nn.Sequential(net, nn.ReLU()).eval() if inside else net
    if inside and not said.startswith("Net changes self"):
        said = said.replace("Net ", "Sequential ", 1)
    before = state(net)
    with pytest.raises(ValueError, match=f"argument model: .*{said}"):
        build_engine(model, images(*SHAPE), timings=timings)
    assert state(net) == before


def test_a_list_that_two_modules_share_stays_one(timings: Path) -> None:
    first: Any = made(lambda: Net(lambda s, y: y * len(s.kept)))
    second: Any = made(lambda: conv(16, 16))
    shared = first.kept = second.kept = [1, 2]
    build_engine(nn.Sequential(first, second).eval(), images(*SHAPE), timings=timings)
    assert first.kept is shared and second.kept is shared


def note(s: Any, y: Tensor) -> Tensor:
    s.shape = y.shape
    return y


def cached(s: Any, y: Tensor) -> Tensor:
    if s.shape != y.shape:
        s.shape, s.last = y.shape, torch.arange(y.shape[-1], dtype=y.dtype).sin()
    return y + s.last


def cached_in_dict(s: Any, y: Tensor) -> Tensor:
    if "bias" not in s.cache:
        s.cache["bias"] = s.conv.weight.mean() + 1
    return y * s.cache["bias"]


@pytest.mark.parametrize("act", [note, cached, cached_in_dict])
def test_what_is_noted_once_changes_no_answer(act: Any, timings: Path) -> None:
    model, x = made(lambda: Net(act)), images(*SHAPE)
    before = state(model)
    engine = build_engine(model, x, batch_sizes=(1, 2), timings=timings)
    assert state(model) == before
    other = made(lambda: Net(act))
    nn.init.normal_(other.get_parameter("conv.weight"))
    engine.refresh(other.state_dict())
    with torch.no_grad():
        for _ in range(2):
            assert error(engine(x), other(x)) < 2e-6


# Questions about memory

QUESTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "is_contiguous": lambda s, x: s.c(x) * (2 if x.is_contiguous() else 3),
    "is_contiguous of a result": lambda s, x: (y := s.c(x)) * (2 if y.is_contiguous() else 3),
    "channels_last": lambda s, x: s.c(x) * (
        2 if x.is_contiguous(memory_format=torch.channels_last) else 3),
    "stride": lambda s, x: s.c(x) * x.stride(1),
    "stride by its function": lambda s, x: s.c(x) * torch.Tensor.stride(x)[1],
    "dim_order": lambda s, x: s.c(x) * (1 + x.dim_order()[1]),
}  # fmt: skip
LYING: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: images(*SHAPE),
    "channels last": lambda: images(*SHAPE).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: images(2, 3, 9, 20)[..., ::2],
}


@pytest.mark.parametrize("built", LYING)
@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_about_memory_hold_for_what_lies_alike(
    name: str, built: str, timings: Path, tmp_path: Path
) -> None:
    model = made(lambda: Scope(QUESTIONS[name], c=conv()))
    engine = build_engine(model, LYING[built](), timings=timings)
    engine.save(tmp_path / "asked.engine")
    for one in (engine, load_engine(tmp_path / "asked.engine")):
        for lies, make in LYING.items():
            x = make()
            if lies == built:
                with torch.no_grad():
                    assert error(one(x), model(x)) < 2e-6
                continue
            with pytest.raises(ValueError, match=r"argument x: strides .* asks how") as refusal:
                one(x)
            assert "\n" not in str(refusal.value)


def test_a_question_about_the_offset(timings: Path) -> None:
    model = made(lambda: Scope(lambda s, x: s.c(x) * (1 + x.storage_offset()), c=conv()))
    engine, x = build_engine(model, images(*SHAPE), timings=timings), images(4, *SHAPE[1:])
    engine(x[:2])
    with pytest.raises(ValueError, match=r"argument x: .*at offset 540; .*at offset 0"):
        engine(x[2:])


def test_padded_batches_lie_alike_too(timings: Path) -> None:
    model = made(lambda: Scope(QUESTIONS["is_contiguous"], c=conv()))
    engine = build_engine(model, images(*SHAPE), other_batches="pad", timings=timings)
    x = images(1, *SHAPE[1:])
    with torch.no_grad():
        assert error(engine(x), model(x)) < 2e-6
    with pytest.raises(ValueError, match="argument x: strides"):
        engine(images(1, 3, 9, 20)[..., ::2])


def test_nothing_is_asked_by_torch_itself(timings: Path) -> None:
    model = made(lambda: nn.Sequential(conv(), nn.BatchNorm2d(16), nn.Upsample(scale_factor=2.0)))
    engine = build_engine(model, images(*SHAPE), timings=timings)
    for make in LYING.values():
        with torch.no_grad():
            assert error(engine(make()), model(make())) < 2e-6


@pytest.mark.parametrize("name", ["as_strided", "untyped_storage"])
def test_memory_by_its_address_is_refused(name: str, timings: Path) -> None:
    acts: dict[str, Callable[[Any, Tensor], Any]] = {
        "as_strided": lambda s, x: (y := s.c(x)).as_strided(y.shape, (1440, 1, 160, 16)),
        "untyped_storage": lambda s, x: s.c(x) * x.untyped_storage().nbytes(),
    }
    with pytest.raises(ValueError, match=rf"argument model: Scope calls {name}\(\) in its forward"):
        build_engine(made(lambda: Scope(acts[name], c=conv())), images(*SHAPE), timings=timings)


@pytest.mark.parametrize("layout", [[1], [1, 2, 3, -4], ["a", 1, 1, 1], [1] * 7, 3])
def test_a_forged_layout(layout: Any, timings: Path, tmp_path: Path) -> None:
    model = made(lambda: Scope(QUESTIONS["stride"], c=conv()))
    build_engine(model, images(*SHAPE), timings=timings).save(tmp_path / "asked.engine")
    saved = Saved(tmp_path / "asked.engine")
    (plan,) = saved.told["plans"].values()
    plan["graph"]["layout"] = layout
    saved.write(tmp_path / "asked.engine", renewed=True)
    with pytest.raises(ValueError, match="argument path: "):
        load_engine(tmp_path / "asked.engine")


def test_a_file_without_a_layout_is_read(timings: Path, tmp_path: Path) -> None:
    model = made(lambda: Scope(lambda s, x: s.c(x), c=conv()))
    build_engine(model, images(*SHAPE), timings=timings).save(tmp_path / "plain.engine")
    (plan,) = Saved(tmp_path / "plain.engine").told["plans"].values()
    assert "layout" not in plan["graph"]
    load_engine(tmp_path / "plain.engine")(LYING["channels last"]())


TYPES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "type": lambda s, y: y * (2 if type(y) is Tensor else 3),
    "class": lambda s, y: y * (2 if y.__class__ is Tensor else 3),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_tensors_type_is_not_torchs_while_it_captures(name: str, timings: Path) -> None:
    model = made(lambda: Net(TYPES[name]))
    with pytest.raises(ValueError, match=r"argument model: Net asks type\(\) in its forward"):
        build_engine(model, images(*SHAPE), timings=timings)


def test_the_type_of_something_else_may_be_asked(timings: Path) -> None:
    model, x = made(lambda: Net(lambda s, y: y * len(type(s).__name__))), images(*SHAPE)
    with torch.no_grad():
        assert error(build_engine(model, x, timings=timings)(x), model(x)) < 2e-6


# torch's default device


@pytest.fixture
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("at", ["build", "refresh", "load", "call"])
def test_a_default_device_without_numbers(
    at: str, timings: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = made(lambda: nn.Sequential(conv(), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16)))
    x = images(*SHAPE)
    with torch.no_grad():
        want = model(x)
    steps: dict[str, Callable[[Engine], Engine | None]] = {
        "build": lambda _: build_engine(model, x, timings=timings),
        "refresh": lambda engine: engine.refresh(model.state_dict()),
        "load": lambda _: load_engine(tmp_path / "saved.engine"),
        "call": lambda engine: engine,
    }
    engine: Any = None
    for step in ("build", "save", "refresh", "load", "call"):
        if step == at:
            request.getfixturevalue("meta")
        engine = steps[step](engine) or engine if step != "save" else engine
        if step == "save":
            engine.save(tmp_path / "saved.engine")
    assert error(engine(x), want) < 2e-6
