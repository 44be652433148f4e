"""CUDA graphs of the engine: on a GPU what they compute, hold and allow; without one, with
stand-ins, what is done in which order.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from agreement import require_close
from kernel_inputs import DEVICE, NEEDS_GPU
from resfuse.kernels import Engine, build_engine, load_engine
from resfuse.kernels.engine.ir.graph import Graph, Value
from resfuse.kernels.engine.runtime.cuda_graph import Recorded, Turns
from resfuse.kernels.gpu.common import graph_capture

SIZES = (1, 3)
REDUCTION = 9 * 64  # of its longest sum, roughly squared by the second layer


class Small(nn.Module):
    """Stem, bottleneck with a projection, another's first 1x1, classifier: each GPU tactic's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.conv2, self.conv3 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 128, 1)
        self.downsample, self.conv1 = nn.Conv2d(64, 128, 1), nn.Conv2d(128, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = torch.relu(self.conv3(torch.relu(self.conv2(x))) + self.downsample(x))
        z = torch.relu(self.conv1(y))
        return self.fc(z.mean((2, 3))), y


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval().to(DEVICE, torch.float16 if DEVICE == "cuda" else torch.float32)


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 32, 32, generator=generator)
    return x.to(DEVICE, torch.float16 if DEVICE == "cuda" else torch.float32)


@pytest.fixture(scope="module")
def engine(model: nn.Module, timings: Path) -> Engine:
    return build_engine(model, images(1), batch_sizes=SIZES, timings=timings)


def require_like(model: nn.Module, got: tuple[Tensor, Tensor], x: Tensor) -> None:
    """Fails unless the answer is the model's own in fp64."""
    exact = Small().eval().to(DEVICE, torch.float64)
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        wanted = exact(x.double())
    mode = "fp16" if x.dtype == torch.float16 else "ieee"
    for part, want in zip(got, wanted, strict=True):
        require_close(part, want, mode, REDUCTION)


gpu = [NEEDS_GPU, pytest.mark.gpu]


class TestOnTheDevice:
    """Each of these needs the real thing: streams, a pool of memory, replays."""

    pytestmark = gpu

    def test_replays_answer_for_the_inputs_they_are_given(
        self, engine: Engine, model: nn.Module
    ) -> None:
        """In any order of batch sizes, for they share memory; and nothing of the last remains."""
        assert engine.cuda_graph
        for seed, n in enumerate((1, 3, 3, 1, 3, 1, 1)):
            x = images(n, seed)
            require_like(model, engine(x), x)

    def test_answers_are_the_callers_to_keep(self, engine: Engine) -> None:
        first = engine(images(3, 1))
        kept = [t.clone() for t in first]
        engine(images(3, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
        again = engine(images(3, 1))
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))

    def test_an_input_may_change_once_the_call_is_behind_it_on_the_stream(
        self, engine: Engine
    ) -> None:
        x = images(3, 1)
        want = engine(x)[0].clone()
        got = engine(x)[0]
        x.zero_()
        assert torch.equal(got, want)

    def test_without_graphs_the_answer_is_the_same(
        self, engine: Engine, model: nn.Module, timings: Path
    ) -> None:
        plain = build_engine(model, images(1), batch_sizes=SIZES, timings=timings, cuda_graph=False)
        assert not plain.cuda_graph and plain.memory().graph_pool_bytes == 0
        for n in SIZES:
            x = images(n, 5)
            assert all(torch.equal(a, b) for a, b in zip(engine(x), plain(x), strict=True))

    @pytest.mark.parametrize("recorded", (True, False))
    def test_calls_from_two_streams_take_turns(
        self, model: nn.Module, timings: Path, recorded: bool
    ) -> None:
        """The streams are kept busy before each call, in turn, so that the calls would overlap."""
        made = build_engine(model, images(3), timings=timings, cuda_graph=recorded)
        inputs = [images(3, seed) for seed in range(2)]
        wanted = [made(x)[0].clone() for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        results: list[tuple[int, Tensor]] = []
        for i in range(40):
            which = i % 2
            with torch.cuda.stream(streams[which]):
                torch.cuda._sleep(200_000 * (1 + i % 3))
                results.append((which, made(inputs[which])[0]))
        torch.cuda.synchronize()
        assert all(torch.equal(y, wanted[which]) for which, y in results)

    def test_two_engines_run_on_two_streams_and_threads(
        self, model: nn.Module, timings: Path
    ) -> None:
        engines = [build_engine(model, images(3), timings=timings) for _ in range(2)]
        inputs = [images(3, seed) for seed in range(2)]
        wanted = [made(x)[0].clone() for made, x in zip(engines, inputs, strict=True)]
        torch.cuda.synchronize()
        wrong: list[int] = []

        def work(which: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(100):
                    y = engines[which](inputs[which])[0]
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(y, wanted[which]):
                        wrong.append(which)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_building_one_does_not_disturb_another_that_runs(
        self, model: nn.Module, engine: Engine, timings: Path
    ) -> None:
        x = images(3, 3)
        want = engine(x)[0].clone()
        stop = threading.Event()
        wrong: list[int] = []

        def work() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    y = engine(x)[0]
                    torch.cuda.current_stream().synchronize()
                    wrong.extend([] if torch.equal(y, want) else [1])

        thread = threading.Thread(target=work)
        thread.start()
        try:
            build_engine(model, images(1), batch_sizes=SIZES, timings=timings)
        finally:
            stop.set()
            thread.join()
        assert not wrong

    def test_new_weights_are_recorded_anew(self, model: nn.Module, timings: Path) -> None:
        made = build_engine(model, images(1), batch_sizes=SIZES, timings=timings)
        x = images(3, 4)
        before = made(x)[0].clone()
        other = Small().eval().to(DEVICE, torch.float16)
        made.refresh(other.state_dict())
        assert not torch.equal(made(x)[0], before)
        require_like(other, made(x), x)

    def test_a_saved_engine_records_when_it_is_loaded(
        self, engine: Engine, model: nn.Module, tmp_path: Path
    ) -> None:
        engine.save(tmp_path / "small.engine")
        loaded = load_engine(tmp_path / "small.engine")
        assert loaded.cuda_graph
        x = images(3, 6)
        assert torch.equal(loaded(x)[0], engine(x)[0])

    def test_smaller_batches_are_padded(self, model: nn.Module, timings: Path) -> None:
        made = build_engine(model, images(3), other_batches="pad", timings=timings)
        x = images(2, 7)
        require_like(model, made(x), x)

    def test_outputs_have_the_inputs_memory_format(self, engine: Engine) -> None:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = engine(images(3).contiguous(memory_format=memory_format))[1]
            assert y.is_contiguous(memory_format=memory_format)

    def test_memory_is_what_the_allocator_says(self, engine: Engine) -> None:
        """Within 2 %: of what is reserved for the pool, and of all that is allocated."""
        built = {size: b.executor for size, b in engine._built.items()}
        warm = Recorded(built, torch.device("cuda", 0))  # cuDNN has its handles and workspaces
        del warm
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        recorded = Recorded(built, torch.device("cuda", 0))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        more = torch.cuda.memory_reserved() - reserved
        rounded = sum(max(t.untyped_storage().nbytes(), 2 << 20) for t in recorded._inputs.values())
        assert recorded.pool_bytes <= more * 1.02
        assert more <= (recorded.pool_bytes + rounded) * 1.02
        outputs = sum(t.nbytes for replay in recorded._replays.values() for t in replay.made)
        held = torch.cuda.memory_allocated() - allocated
        assert held == pytest.approx(recorded.input_bytes + outputs, rel=0.02, abs=16 << 10)

    def test_the_engine_reports_its_pool(self, engine: Engine) -> None:
        memory = engine.memory()
        assert memory.graph_pool_bytes > 0 and memory.graph_pool_bytes % 512 == 0
        assert memory.graph_inputs_bytes == sum(n * 3 * 32 * 32 * 2 for n in SIZES)
        least = 3 * 64 * 16 * 16 * 2  # the stem's output, if nothing else
        assert memory.graph_pool_bytes >= least

    def test_what_cannot_be_recorded_is_said(self) -> None:
        def synchronises(x: Tensor) -> list[Tensor]:
            return [x + x.sum().item()]

        with pytest.raises(ValueError, match=r"argument cuda_graph: .*cuda_graph=False"):
            Recorded({1: _executor(synchronises)}, torch.device("cuda", 0))
        torch.cuda.synchronize()
        assert float(torch.ones(4, device="cuda").sum()) == 4  # the device is as it was

    def test_another_current_device_does_not_matter(self, engine: Engine) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU only")
        x = images(1)
        want = engine(x)[0]
        with torch.cuda.device(1):
            assert torch.equal(engine(x)[0], want)


def _executor(run):  # type: ignore[no-untyped-def]
    """What Recorded takes for an executor: a graph's input, and a call."""

    class Executor:
        graph = Graph("x", ("y",), (), {"x": Value((2, 3, 4, 4), torch.float32)})

        def __call__(self, x: Tensor) -> list[Tensor]:
            return run(x)

    return Executor()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of torch.cuda, which is stood in for."""
    happened: list[str] = []

    class Event:
        def synchronize(self) -> None:
            happened.append("the host waits")

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            happened.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            happened.append(f"{self.name} waits for the last run")

        def record_event(self) -> Event:
            happened.append(f"{self.name} ends a run")
            return Event()

        def synchronize(self) -> None:
            happened.append(f"{self.name} done")

    class CUDAGraph:
        def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
            happened.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self) -> None:
            happened.append("end")

        def replay(self) -> None:
            happened.append("replay")

    stand_ins = {
        "Stream": Stream, "CUDAGraph": CUDAGraph,
        "graph_pool_handle": lambda: (0, 7),
        "current_stream": lambda: Stream("caller"),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "empty_cache": lambda: happened.append("empty"),
        "memory_snapshot": lambda: [
            {"segment_pool_id": (0, 0), "total_size": 1}, {"segment_pool_id": (0, 7),
             "total_size": 20}, {"segment_pool_id": (0, 7), "total_size": 300},
        ],
    }  # fmt: skip
    for name, instead in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    yield happened


def test_all_are_warm_before_the_first_is_recorded_the_largest_first(said: list[str]) -> None:
    executors = {
        size: _executor(lambda x, size=size: said.append(f"run {size}") or [x * size])
        for size in (1, 8)
    }
    recorded = Recorded(executors, torch.device("cpu"))
    warm = ["side waits for caller", "run {0}", "run {0}", "side done"]
    one, eight = ([line.format(size) for line in warm] for size in (1, 8))
    of = ["begin (0, 7) thread_local", "run {0}", "end"]
    largest_first = [line.format(size) for size in (8, 1) for line in of]
    assert said == [*one, *eight, "empty", *largest_first]
    said.clear()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(recorded(8, x)[0], torch.zeros(2, 3, 4, 4))  # as recorded: the stand-in
    assert said == ["replay"]
    assert torch.equal(recorded._inputs[8], x)
    assert recorded._inputs[8].is_contiguous(memory_format=torch.channels_last)
    assert recorded.pool_bytes == 320
    assert recorded.input_bytes == 2 * 2 * 3 * 4 * 4 * 4


def test_a_failure_ends_the_capture_and_is_explained(said: list[str]) -> None:
    def fails(x: Tensor) -> list[Tensor]:
        if "empty" in said:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return [x]

    with pytest.raises(ValueError, match=r"stream is capturing\); build the engine with"):
        Recorded({1: _executor(fails)}, torch.device("cpu"))
    assert said[-1] == "end"


def test_a_clock_gets_the_graph_or_what_cannot_be_one(said: list[str]) -> None:
    made = object()
    assert graph_capture.replayed(lambda: made, torch.device("cpu"))() is made
    assert said[-1] == "replay"

    def fails() -> None:
        if said[-1].startswith("begin"):
            raise RuntimeError("synchronises")

    assert graph_capture.replayed(fails, torch.device("cpu")) is fails


def test_turns_wait_for_the_run_before(said: list[str]) -> None:
    turns = Turns(torch.device("cpu"))
    with turns:
        said.append("first")
    with contextlib.suppress(KeyError), turns:
        said.append("second")
        raise KeyError
    with turns:
        said.append("third")
    assert said == [
        "first", "caller ends a run",
        "caller waits for the last run", "second", "caller ends a run",
        "caller waits for the last run", "third", "caller ends a run",
    ]  # fmt: skip
    said.clear()
    turns.finish()
    assert said == ["caller waits for the last run", "caller ends a run", "the host waits"]
    said.clear()
    Turns(torch.device("cpu")).finish()  # what was laid out before the first run
    assert said == ["caller ends a run", "the host waits"]


@pytest.mark.skipif(DEVICE == "cuda", reason="of machines without a GPU")
def test_on_a_cpu_nothing_is_recorded(engine: Engine, model: nn.Module) -> None:
    assert not engine.cuda_graph
    memory = engine.memory()
    assert (memory.graph_pool_bytes, memory.graph_inputs_bytes) == (0, 0)
    assert "Times were measured on this device" in engine.explain()
    x = images(3)
    require_like(model, engine(x), x)
