"""Forwards that do more than compute: fuse and explain leave no trace of them, and runs do them."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from effectful_forwards import (
    FORWARDS,
    kind,
    noise_when_asked,
    own_state,
    reset,
    seed,
    shared_state,
)
from hostile import images, is_fused, pair_of, require_same, spread
from resfuse.kernels import explain, fuse


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    reset()


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_fuse_and_explain_leave_no_trace(forward: Any) -> None:
    model = spread(kind(forward)())
    seed()
    dice = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    before = own_state(model), shared_state()
    fused = fuse(model)
    assert (own_state(model), shared_state()) == before
    explain(model)  # runs a copy once, to count: what all copies share may change
    assert own_state(model) == own_state(fused) == before[0]
    assert random.getstate() == dice[0] and np.random.get_state()[1].tolist() == dice[1]
    assert torch.equal(torch.get_rng_state(), dice[2])


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_runs_do_what_they_do(forward: Any) -> None:
    seed()
    plain = spread(kind(forward)())
    fused = fuse(plain)
    results = []
    for model in (plain, fused):
        seed()
        with torch.no_grad():
            ys = [model(images(i)) for i in range(3)]
        results.append((ys, own_state(model), shared_state()))
        reset()
    require_same(results[1][0], results[0][0])
    _require_close(results[1][1:], results[0][1:])


def _require_close(got: Any, want: Any) -> None:
    if isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            _require_close(one, other)
    elif isinstance(want, dict):
        _require_close(list(got.items()), list(want.items()))
    else:
        assert got == want


def test_noise_that_is_switched_on_later() -> None:
    plain, fused = pair_of(kind(noise_when_asked))
    assert is_fused(fused)
    for model in (plain, fused):
        model.noise_std = 1.0
    seed()
    with torch.no_grad():
        want = plain(images())
        seed()
        require_same(fused(images()), want)
