"""load_engine: reads an engine from a file that `Engine.save` has written."""

from collections.abc import Collection
from pathlib import Path

from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.runtime.default_device import without_meta
from resfuse.kernels.engine.saving.engine_file import Saved, cannot_run, read
from resfuse.kernels.engine.shapes.bound_plan import bind


@without_meta()
def load_engine(path: str | Path, *, allow: Collection[str] = ()) -> Engine:
    """Returns a saved engine on the device it was planned for, without measuring anything.

    Args:
        path: the file.
        allow: names of operations that the engine may run besides those of torch that only compute,
            as `explain` prints them ("torchvision.roi_align.default").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no engine, damaged, of another schema, or for another device or
            other software; or its plan is not consistent, or runs an operation that is not allowed.
    """
    saved = read(Path(path), allow)
    try:
        return _engine(saved)
    except Exception as error:  # a plan that is not trusted may lead to any error
        raise cannot_run(Path(path), error) from error


def _engine(saved: Saved) -> Engine:
    weight_store = WeightStore()
    with asking(saved.threads):
        plans = [
            bind(graph, segments, saved.state, weight_store)
            for graph, segments in saved.plans.values()
        ]
    return Engine(
        plans, saved.state, other_batches=saved.other_batches, other_shapes=saved.other_shapes,
        cuda_graph=saved.cuda_graph, threads=saved.threads,
    )  # fmt: skip
