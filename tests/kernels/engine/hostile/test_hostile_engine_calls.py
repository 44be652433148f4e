"""What people do with an engine: train behind it, transform it, copy it, fork beside it. It answers
as the plain model does, or a sentence says what to do instead.
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
from torch import Tensor, nn

from engine_models import conv, images, made
from hostile_engine import SHAPE, mixed
from resfuse.kernels import Engine, build_engine
from scope import Scope

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(timings: Path) -> Engine:
    return build_engine(made(mixed), images(*SHAPE), timings=timings)


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
        engine._runner._lock.acquire()
    child.start()
    if held:
        engine._runner._lock.release()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs and child.exitcode == 0
    assert queue.get(timeout=10) == pytest.approx(want, rel=1e-4)
    assert engine(x).sum().item() == pytest.approx(want, rel=1e-4)
