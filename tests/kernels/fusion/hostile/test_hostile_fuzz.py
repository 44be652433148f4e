"""Random modules made of the habits people have, fused, called, changed, and called again: what a
fused one answers, raises, or leaves behind is what a plain one does. 500 examples here, 450 of fuse
and 50 of engines. With tests/helpers and tests/helpers/networks on PYTHONPATH,
`python tests/kernels/fusion/hostile/test_hostile_fuzz.py fuse 100 200` tries 100 other seeds.
"""

import copy
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

import habits
from habit_calls import CALLS, INPUTS, input_of
from habit_changes import CHANGES
from habits import FLAGS, LINES, NO_GRAPH, RETURNED, TAKEN, Base
from hostile import spread
from resfuse.kernels import build_engine, explain, fuse

pytestmark = pytest.mark.slow

SEEDS_OF_FUSE, EXAMPLES_OF_FUSE = 9, 50
SEEDS_OF_ENGINES, EXAMPLES_OF_ENGINES = 5, 10
STORES = ("self.kept", "self.cache", "self.last", "self.count")
LOST_IN_COPIES = ("of inference mode", "hook of a weight")  # and fuse makes one
# What torch raises for some float16 convolutions whose weight is an inference tensor; a fused one
# answers.
TORCHS_FAULT = "Inference tensors do not track version counter"
NOT_OF_ENGINES = ("y.view(",)  # an engine answers where a plain one raises, for strided inputs
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {  # of a fused model, instead of a change
    "copy": copy.deepcopy,
    "pickle": lambda fused: pickle.loads(pickle.dumps(fused)),
    "fuse again": fuse,
}


@dataclass
class Case:
    source: str  # of the forward
    in_place: bool
    layers: int  # which layers there are of a kind is drawn from this
    first: list[tuple[str, int]]  # changes before fuse, each to which of the modules of its kind
    later: list[tuple[str, int]]
    calls: list[tuple[str, str]]  # the argument, and how

    def make(self) -> Any:
        scope: dict[str, Any] = {}
        exec(compile(self.source, "<habits>", "exec"), vars(habits), scope)
        kind = type("Habits", (Base,), {"forward": scope["forward"], "__module__": "habits"})
        habits.Habits = kind  # type: ignore[attr-defined]  # where pickle looks for it
        FLAGS["on"] = True
        torch.manual_seed(0)
        return spread(kind(self.source, self.in_place, self.layers))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    captured = st.sampled_from([line for line in LINES if line not in NO_GRAPH])
    lines = draw(st.lists(captured, max_size=4))
    others = st.lists(st.sampled_from(sorted(NO_GRAPH)), min_size=1, max_size=2)
    pair = draw(st.sampled_from(["chain", "chain", "late norm", "two chains", "blocks"]))
    for line in [pair, *draw(st.one_of(st.just([]), st.just([]), others))]:
        lines.insert(draw(st.integers(0, len(lines))), line)
    body = [LINES[line].replace("{k}", str(k)) for k, line in enumerate(lines)]
    body = [draw(st.sampled_from(TAKEN)), *body, "return " + draw(st.sampled_from(RETURNED))]

    early = [change for change in CHANGES if change not in LOST_IN_COPIES]
    change = st.tuples(st.sampled_from(early), st.integers(0, 7))
    later = st.tuples(st.sampled_from([*CHANGES, *COPIES, *COPIES]), st.integers(0, 7))
    call = st.tuples(st.sampled_from(list(INPUTS)), st.sampled_from(list(CALLS)))
    return Case(
        "def forward(self, x):\n    " + "\n    ".join(body),
        draw(st.booleans()),
        draw(st.integers(0, 15)),
        draw(st.lists(change, max_size=1)),
        draw(st.lists(later, max_size=3)),
        [("image", "no_grad"), *draw(st.lists(call, min_size=1, max_size=3))],
    )


def state_of(m: Any) -> list[Any]:
    own = [vars(m).get(name) for name in ("kept", "cache", "calls", "tensor", "number", "last")]
    return [*own, dict(m.state_dict()), [module.training for module in m.modules()], FLAGS]


def run(case: Case) -> None:
    plain = case.make()
    for change in case.first:
        changed(change, plain)
    if not is_copied(plain, copy.deepcopy):
        return
    before = copy.deepcopy(state_of(plain))
    fused = fuse(plain)
    if case.layers % 4 == 0:
        explain(plain)
    same(state_of(plain), before)
    done: list[Any] = []
    try:
        answer_alike(plain, fused, case, case.calls, runs=2)
        for change in case.later:
            done.append(change)
            if change[0] in COPIES:
                if is_copied(plain, COPIES[change[0]]):
                    fused = COPIES[change[0]](fused)
                    if change[0] == "pickle":  # which makes leaves of what an operation returned
                        plain = COPIES[change[0]](plain)
            else:
                flags = dict(FLAGS)
                raised = changed(change, plain)
                FLAGS.update(flags)
                assert changed(change, fused) == raised
            answer_alike(plain, fused, case, case.calls[:3], runs=1)
    except Exception as error:
        raise AssertionError(f"{case.source}\n{case}\nafter {done}: {error!r}"[:6000]) from error


def is_copied(model: nn.Module, how: Callable[[nn.Module], object]) -> bool:
    """Whether a plain one is: not where a weight is computed from others, or a hook is a lambda."""
    try:
        how(model)
    except Exception:
        return False
    return True


def changed(change: tuple[str, int], model: nn.Module) -> str | None:
    """What a change of one of the model's modules raises."""
    kind, act = CHANGES[change[0]]
    names = [name for name, module in model.named_modules() if isinstance(module, kind)]
    if not names:
        return None
    torch.manual_seed(1)
    try:
        act(model, names[change[1] % len(names)])
    except Exception as error:
        return type(error).__name__
    return None


def answer_alike(
    plain: Any, fused: Any, case: Case, calls: list[tuple[str, str]], runs: int
) -> None:
    kept, coarse, source = [], False, case.source
    for name, how in calls * runs:
        if how == "vmap" and any(line in source for line in STORES):
            continue  # what vmap wraps may not be read outside
        given, too = input_of(name, plain), input_of(name, fused)
        want, got = outcome(plain, given, how), outcome(fused, too, how)
        if want == TORCHS_FAULT:
            return
        try:
            coarse = coarse or is_coarse(plain, given, how)  # what it keeps is, too
            same(got, want, coarse)
            assert shared(got, too) == shared(want, given), "what shares memory with the argument"
            same(too, given)
            same(state_of(fused), state_of(plain), coarse)
        except Exception as error:
            raise AssertionError(f"{name}, {how}: {error}") from error
        if isinstance(want, str):  # what is written before an error is not promised
            return
        spoilt = not all(dense(t).isfinite().all() for t in tensors(want))
        if spoilt and (".sum()" in source or ".max()" in source):  # they may branch on NaN
            return
        kept.append((got, copied(got), want, copied(want)))
    for got, then, want, then_too in kept:  # a later call may write to an earlier one's answer
        if equal(want, then_too):
            assert equal(got, then), "an answer that was kept has changed"


def outcome(model: Any, x: Any, how: str) -> Any:
    torch.manual_seed(2)
    try:
        return CALLS[how](model, x)
    except Exception as error:
        return TORCHS_FAULT if TORCHS_FAULT in str(error) else type(error).__name__


def same(got: Any, want: Any, coarse: bool = False, strides: bool = True) -> None:
    """The same structure, types and strides, and numbers to 1e-4 of the largest, or where bfloat16
    is computed with (`coarse`) to 2e-1: each of the two may be off from fp64 by half of it."""
    (leaves, spec), (wanted, wanted_spec) = tree_flatten(got), tree_flatten(want)
    assert spec == wanted_spec, f"{got} instead of {want}"
    for one, other in zip(leaves, wanted, strict=True):
        assert type(one) is type(other), f"{one} instead of {other}"
        if not isinstance(other, Tensor):
            assert repr(one) == repr(other) or " at 0x" in repr(other), f"{one} instead of {other}"
            continue
        for fact in ("layout", "dtype", "shape", "requires_grad"):
            assert getattr(one, fact) == getattr(other, fact), f"{fact}: {getattr(one, fact)}"
        if strides and other.layout == torch.strided:
            assert one.stride() == other.stride(), f"{one.stride()} instead of {other.stride()}"
        one, other = (dense(t) for t in (one, other))
        size = max([1.0, *other[other.isfinite()].abs().flatten().tolist()])
        if other.dim() and len(other) > 1:  # oneDNN's ReLU drops NaN, Winograd spreads it
            whole = other.isfinite().flatten(1).all(1) if other.dim() > 1 else other.isfinite()
            one, other = one[whole], other[whole]
        elif not other.isfinite().all():
            continue
        within = size * (2e-1 if coarse else 1e-4)
        torch.testing.assert_close(one, other, rtol=0, atol=within)


def dense(x: Tensor) -> Tensor:
    x = x.detach().to_dense()
    return (x if type(x) is Tensor else x.as_subclass(Tensor)).double()


def is_coarse(model: nn.Module, x: Any, how: str) -> bool:
    found = [*model.parameters(), *tree_leaves(x)]
    dtypes = {t.dtype for t in found if isinstance(t, Tensor)}
    return how == "autocast" or not dtypes.isdisjoint((torch.float16, torch.bfloat16))


def tensors(answer: Any) -> list[Tensor]:
    """Those that are memory."""
    leaves = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.layout == torch.strided]


def shared(answer: Any, x: Any) -> list[bool]:
    memory = {t.untyped_storage().data_ptr() for t in tensors(x) if t.numel()}
    return [t.untyped_storage().data_ptr() in memory for t in tensors(answer)]


def copied(answer: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors(answer)]


def equal(answer: Any, then: list[Tensor]) -> bool:
    pairs = zip(tensors(answer), then, strict=True)
    return all(torch.equal(now.detach().nan_to_num(), was.nan_to_num()) for now, was in pairs)


def examples(run_one: Callable[[Case], Any], number: int, count: int, shrink: bool = True) -> None:
    """Runs the examples of a seed."""
    phases = (Phase.generate, Phase.shrink)[: 1 + shrink]

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(cases())
    def check(case: Case) -> None:
        run_one(case)

    check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(SEEDS_OF_FUSE))
def test_habits(number: int) -> None:
    examples(run, number, EXAMPLES_OF_FUSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(SEEDS_OF_ENGINES))
def test_engines_of_habits(number: int) -> None:
    examples(run_engine, number, EXAMPLES_OF_ENGINES)


def run_engine(case: Case) -> bool:
    """An engine answers as the model did when it was built, or is refused, as inputs of
    other strides may be; what is done later to the model changes nothing. Returns whether there was
    an engine."""
    if any(words in case.source for words in NOT_OF_ENGINES):
        return False
    model = case.make()
    for change in case.first:
        changed(change, model)
    if not is_copied(model, copy.deepcopy):
        return False
    before, plain = copy.deepcopy(state_of(model)), copy.deepcopy(model)
    flags, example = dict(FLAGS), input_of("image", model)
    if not answers(copy.deepcopy(plain), example.clone()):
        return False
    try:
        engine = build_engine(model, example)
    except (ValueError, TypeError):
        return False
    try:
        same(state_of(model), before)
        for round_ in range(2):
            for name in ("image", "channels last", "sliced", "image"):
                given, too = input_of(name, plain), input_of(name, plain)
                FLAGS.update(flags)
                torch.manual_seed(2)
                with torch.no_grad():
                    want = plain(given)
                torch.manual_seed(2)
                try:
                    got = engine(too)
                except ValueError as refusal:
                    assert name != "image" and "how its tensors lie in memory" in str(refusal)
                    continue
                same(got, want, is_coarse(plain, given, ""), strides=False)
                same(too, input_of(name, plain))
            for change in case.later if not round_ else ():
                if change[0] not in COPIES:
                    changed(change, model)
    except Exception as error:
        raise AssertionError(f"{case.source}\n{case}\n{error!r}"[:6000]) from error
    return True


def answers(model: nn.Module, x: Tensor) -> bool:
    """Whether it does by itself: a norm in float64 may not follow a convolution in float32."""
    flags = dict(FLAGS)
    try:
        with torch.no_grad():
            model(x)
    except Exception:
        return False
    finally:
        FLAGS.update(flags)
    return True


def main(what: str, first: int, last: int) -> None:
    """Tries the examples of the seeds from `first` to before `last`; prints a line for each."""
    run_one = {"fuse": run, "engine": run_engine}[what]
    count = {"fuse": EXAMPLES_OF_FUSE, "engine": EXAMPLES_OF_ENGINES}[what]
    for number in range(first, last):
        began = time.process_time()
        try:
            examples(run_one, number, count, shrink=False)
            said = f"{count} examples hold"
        except Exception as error:
            said = f"FAILED\n{error}"
        print(f"{what} {number}: {said}, {time.process_time() - began:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
