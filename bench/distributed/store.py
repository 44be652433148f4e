"""Connects to the key-value store by which all processes exchange messages."""

from datetime import timedelta
from math import inf
from threading import Event

from torch.distributed import PrefixStore, Store, TCPStore

from resfuse.bench.measuring.clock.timing import Watch, seconds
from resfuse.bench.running.world import World

CONNECT_S = 60.0
LOOK_S = 0.2


def connect(world: World, host: bool = False) -> Store:
    """Returns the store that all processes share.

    Args:
        host: hold it here, where the launcher does not.

    Raises:
        RuntimeError: no process answers at that address.
    """
    store = TCPStore(
        world.address,
        world.port,
        is_master=host and not world.launcher_store,
        timeout=timedelta(seconds=CONNECT_S),
        wait_for_workers=False,
    )
    return PrefixStore(f"resfuse/{world.attempt}", store)


def appears(store: Store, key: str, limit_s: float = inf) -> bool:
    """Waits for a key; False if it is not there in time.

    Asks again and again: a store that is waited for complains on stderr each time it has to.

    Raises:
        RuntimeError: the store is gone.
    """
    watch, pause = Watch(), Event()
    while not store.check([key]):
        if seconds(watch.elapsed()) > limit_s:
            return False
        pause.wait(LOOK_S)
    return True
