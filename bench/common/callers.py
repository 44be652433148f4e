"""Python threads that call networks at the same time, each kept for all of its calls: a thread has
a team of OpenMP's and scratch memory of its own, which a new one would have to make first."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import BrokenBarrierError
from typing import TypeVar

Found = TypeVar("Found")


def caller(prepare: Callable[[], None] = lambda: None) -> ThreadPoolExecutor:
    """Returns a thread, which runs `prepare` before anything else."""
    return ThreadPoolExecutor(1, initializer=prepare)


def together(threads: Sequence[ThreadPoolExecutor], work: Callable[[int], Found]) -> list[Found]:
    """Runs `work(i)` on the i-th thread, all at the same time.

    Returns:
        what each has returned, once all have.

    Raises:
        the first failure that does not merely say that another one has broken a barrier.
    """
    asked = [thread.submit(work, i) for i, thread in enumerate(threads)]
    wait(asked)
    failures = [failure for one in asked if (failure := one.exception()) is not None]
    own = [failure for failure in failures if not isinstance(failure, BrokenBarrierError)]
    for failure in own or failures:
        raise failure
    return [one.result() for one in asked]
