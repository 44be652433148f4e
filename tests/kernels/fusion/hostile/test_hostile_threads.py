"""What threads do to one fused model at the same time: each gets the answer it would get alone."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hostile import images, require_same, spread
from resfuse.kernels import fuse

RUNS = 150


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Pair(nn.Module):
    """Two convolutions, one of which runs straight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


def require_right_in_threads(*jobs: Callable[[], None]) -> None:
    """Runs jobs again and again, side by side, and raises what any of them raised."""
    raised: list[Exception] = []

    def repeat(job: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                for _ in range(RUNS):
                    job()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=repeat, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@torch.no_grad()
def answering(plain: nn.Module, fused: nn.Module, x: Tensor) -> Callable[[], None]:
    want = plain(x)

    def job() -> None:
        got = fused(x)
        require_same(got, want)
        assert got.stride() == want.stride()

    return job


def test_one_thread_under_autocast(hasty: None) -> None:
    plain = spread(nn.Sequential(*(Pair() for _ in range(6))))
    fused, x = fuse(plain), images(2, (2, 8, 24, 24))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = plain(x)

    def in_bfloat16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            got = fused(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)

    answer = answering(plain, fused, x)
    require_right_in_threads(answer, in_bfloat16, answer)


def test_other_shapes_and_formats(hasty: None) -> None:
    plain = spread(nn.Sequential(Pair(), Pair()))
    fused = fuse(plain)
    inputs = [images(1), images(2, (1, 8, 5, 5)), images(3, (3, 8, 1, 1))]
    inputs += [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    require_right_in_threads(*(answering(plain, fused, x) for x in inputs))


def test_what_was_folded_is_forgotten_meanwhile(hasty: None) -> None:
    """As by an optimizer's step, here one that changes nothing."""
    plain = spread(Pair())
    fused, x = fuse(plain), images(2)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.0)
    for parameter in fused.parameters():
        parameter.grad = torch.zeros_like(parameter)
    answer = answering(plain, fused, x)
    require_right_in_threads(answer, lambda: optimizer.step() and None, answer)
