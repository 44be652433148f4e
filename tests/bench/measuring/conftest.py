"""What tests of several files here need."""

from collections.abc import Iterator

import pytest

from resfuse.bench.measuring.served_network import torch_threads
from resfuse.resnet_ref import models
from served_networks import tiny


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model "tiny" in the zoo, and one thread of torch's, as share_cores leaves it."""
    for registry in (models.MODELS, models.CIFAR):
        monkeypatch.setitem(registry, "tiny", lambda device=None: tiny().to(device))
    with torch_threads(1):
        yield
