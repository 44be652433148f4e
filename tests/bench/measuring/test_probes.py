"""Memory, energy, clocks, environment: real on the CPU, stand-ins for what only a GPU has."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.probes import energy, machine, nvml, peak_memory, processor
from resfuse.bench.measuring.probes import idle as quiet

pytestmark = pytest.mark.slow

MEGABYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_a_step_needs_at_its_worst() -> None:
    """A step that holds 256 MB for a moment; the 64 MB made before it are not its own."""
    before_all = torch.ones(64 * MEGABYTE // 4)
    before = peak_memory.held("cpu")
    peak = peak_memory.peak_of(lambda: torch.ones(256 * MEGABYTE // 4).sum(), "cpu", before)
    assert before is not None and peak.peak is not None and peak.reserved is not None
    assert 250 * MEGABYTE < peak.peak < 300 * MEGABYTE
    assert peak.reserved > peak.peak + before_all.numel() * 4
    idle = peak_memory.peak_of(lambda: None, "cpu", peak_memory.held("cpu"))
    assert idle.peak is not None and idle.peak < 20 * MEGABYTE


def test_peak_memory_is_empty_where_the_system_does_not_say() -> None:
    assert peak_memory.peak_of(lambda: None, "cpu", None) == peak_memory.Memory(None, None)


class Allocator:
    """torch's CUDA allocator by its figures: bytes in use by segment, and segments by pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.segments: list[dict] = []
        self.peak = self.reserved_peak = 0
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "memory_allocated",
                     "max_memory_allocated", "max_memory_reserved", "memory_snapshot"):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def add(self, total: int, allocated: int, pool: tuple[int, int] = (0, 0), at: int = 0) -> dict:
        """A segment, with the fields that torch 2.11 and 2.14 give it."""
        segment = {
            "device": at, "address": 0x7F0000000000, "total_size": total,
            "allocated_size": allocated, "active_size": allocated, "requested_size": allocated,
            "stream": 0, "segment_type": "large", "segment_pool_id": pool, "is_expandable": False,
            "frames": [], "blocks": [],
        }  # fmt: skip
        self.segments.append(segment)
        self._grow()
        return segment

    def use(self, segment: dict, allocated: int) -> None:
        segment["allocated_size"] = segment["active_size"] = allocated
        self._grow()

    def _grow(self) -> None:
        self.peak = max(self.peak, self.memory_allocated())
        self.reserved_peak = max(self.reserved_peak, self._reserved())

    def _reserved(self) -> int:
        return sum(s["total_size"] for s in self.segments if s["device"] == 0)

    def memory_allocated(self) -> int:
        return sum(s["allocated_size"] for s in self.segments if s["device"] == 0)

    def max_memory_allocated(self) -> int:
        return self.peak

    def max_memory_reserved(self) -> int:
        return self.reserved_peak

    def memory_snapshot(self) -> list[dict]:
        return self.segments

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def reset_peak_memory_stats(self) -> None:
        self.calls.append("reset")
        self.peak, self.reserved_peak = self.memory_allocated(), self._reserved()

    def empty_cache(self) -> None:
        """Frees everybody's segments that are empty, and those of graphs that are gone."""
        self.calls.append("empty")
        self.segments = [
            s for s in self.segments if s["allocated_size"] or s["segment_pool_id"][1] > 0
        ]


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def test_gpu_memory_comes_from_the_allocator(allocator: Allocator) -> None:
    """300 bytes before the model, 100 of weights, 600 for a moment of a step; 50 left
    over by set-up do not count."""
    allocator.add(512, 300)
    before = peak_memory.held("cuda")
    allocator.add(128, 100)
    allocator.add(50, 0)
    work = []

    def step() -> None:
        assert allocator.calls[-1] == "reset"
        work.append(allocator.add(640, 600))
        allocator.use(work[0], 10)

    peak = peak_memory.peak_of(step, "cuda", before)
    assert peak == peak_memory.Memory(700, 512 + 128 + 640)
    assert allocator.calls[2:] == ["synchronize", "empty", "reset", "synchronize"]


def test_memory_of_graphs_counts_though_a_replay_allocates_nothing(allocator: Allocator) -> None:
    """One pool of two segments that two graphs share: outputs are alive in it, the rest is free."""
    allocator.add(512, 300)
    before = peak_memory.held("cuda")
    allocator.add(128, 100)
    allocator.add(2000, 40, (0, 7))
    allocator.add(500, 0, (0, 7))
    allocator.add(9000, 0, (0, 8), at=1)  # another GPU's
    peak = peak_memory.peak_of(lambda: None, "cuda", before)
    assert peak == peak_memory.Memory(100 + 2000 + 500, 512 + 128 + 2000 + 500)


def test_graphs_that_were_there_before_are_not_the_candidates(allocator: Allocator) -> None:
    """A peer's graph in the same process, and one of a build's that is gone."""
    allocator.add(2000, 40, (0, 7))
    before = peak_memory.held("cuda")
    allocator.add(800, 30, (0, 9))
    allocator.add(5000, 0, (0, -1))
    assert peak_memory.peak_of(lambda: None, "cuda", before).peak == 800


def test_what_a_step_takes_from_its_pool_counts_once(allocator: Allocator) -> None:
    """As CUDA graphs of torch.compile do, which give an output back once it is unreferenced."""
    for used in ((40, 0), (0, 40), (40, 40)):
        allocator.segments.clear()
        allocator.reset_peak_memory_stats()
        before = peak_memory.held("cuda")
        pool = allocator.add(2000, used[0], (0, 7))

        def step(pool: dict = pool, last: int = used[1]) -> None:
            allocator.use(pool, 40)
            allocator.use(pool, last)

        assert peak_memory.peak_of(step, "cuda", before).peak == 2000


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stand-in for pynvml and the device torch asks it about; `real` is the library."""
    fake = types.SimpleNamespace(
        real=pytest.importorskip("pynvml"),
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1234": "handle"}[uuid],
        nvmlDeviceGetClockInfo=lambda handle, kind: 1755 if kind == 1 else 0,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x4 | 0x40,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    device = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    return fake


def test_clocks_and_throttling_are_read_from_nvml(fake_nvml: types.SimpleNamespace) -> None:
    assert nvml.sm_clock_mhz() == 1755
    assert nvml.throttle() == "power cap + hardware thermal"
    fake_nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x1  # idle
    assert nvml.throttle() == "none"
    del fake_nvml.nvmlDeviceGetCurrentClocksEventReasons  # an older library has another name
    fake_nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x20
    assert nvml.throttle() == "software thermal"


def test_without_nvml_the_columns_stay_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.sm_clock_mhz() is None
    assert nvml.throttle() is None


def test_every_reason_nvml_knows_is_told(fake_nvml: types.SimpleNamespace) -> None:
    """By the names of the real library's constants; what it adds later shows as a number."""
    told = {
        "ApplicationsClocksSetting": "application clocks", "SwPowerCap": "power cap",
        "HwSlowdown": "hardware slowdown", "SwThermalSlowdown": "software thermal",
        "HwThermalSlowdown": "hardware thermal", "HwPowerBrakeSlowdown": "power brake",
        "DisplayClockSetting": "display clocks", "GpuIdle": "none", "SyncBoost": "none",
    }  # fmt: skip
    for name, words in told.items():
        names = (f"nvmlClocks{kind}Reason{name}" for kind in ("Event", "Throttle"))
        bit = next(getattr(fake_nvml.real, n) for n in names if hasattr(fake_nvml.real, n))
        fake_nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle, bit=bit: bit
        assert nvml.throttle() == words
    fake_nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x4 | 0x1000
    assert nvml.throttle() == "power cap + reason 0x1000"


def test_gpu_energy_is_the_counters_difference_over_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A counter that gains 500 mJ a step, when the device comes to it; what came before the first
    reading does not count. The device is never far behind."""
    counter, queue, longest = [123_000], [], [0]

    def synchronize() -> None:
        counter[0] += 500 * len(queue)
        queue.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(nvml, "read", lambda function: counter[0])

    def step() -> None:
        queue.append("step")
        longest[0] = max(longest[0], len(queue))

    assert energy.joules_of(step, "cuda", seconds_s=0.02) == pytest.approx(0.5)
    assert counter[0] > 123_000 + 500 * 16 and 1 < longest[0] <= 16


@pytest.fixture
def rapl(tmp_path: Path) -> Path:
    """The kernel's folder on a machine of two packages, with zones that are parts or sums."""
    names = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1", "intel-rapl:2": "psys",
    }  # fmt: skip
    for zone, name in names.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text("1000000\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("262143328850\n")
    return tmp_path


def gain(folder: Path, microjoules: int, most: int = 262143328850) -> None:
    """Every counter of the folder goes on, around the end of its range where it comes there."""
    for counter in folder.glob("*/energy_uj"):
        counter.write_text(f"{(int(counter.read_text()) + microjoules) % most}\n")


def test_cpu_energy_adds_the_packages_and_nothing_twice(rapl: Path) -> None:
    joules = energy.joules_of(lambda: gain(rapl, 250_000), "cpu", rapl, 0.02)
    assert joules == pytest.approx(2 * 0.25)  # not the cores, memory or the board


def test_a_counter_that_wraps_around_goes_on(rapl: Path) -> None:
    (rapl / "intel-rapl:1" / "energy_uj").write_text("262143328849\n")
    joules = energy.joules_of(lambda: gain(rapl, 250_000), "cpu", rapl, 0.02)
    assert joules == pytest.approx(2 * 0.25)
    counters = energy.Counters(rapl)
    zone = str(rapl / "intel-rapl:0")
    assert counters.gained({zone: 262143.0}, {zone: 1.0}) == pytest.approx(1.32885)


def test_without_readable_counters_energy_is_empty(rapl: Path, tmp_path: Path) -> None:
    assert energy.joules_of(lambda: None, "cpu", tmp_path / "none", 0.02) is None
    (rapl / "intel-rapl:1" / "max_energy_range_uj").unlink()
    (rapl / "intel-rapl:1" / "energy_uj").write_text("262143328849\n")
    assert energy.joules_of(lambda: gain(rapl, 250_000), "cpu", rapl, 0.02) is None  # wrapped
    (rapl / "intel-rapl:0" / "energy_uj").unlink()  # as for all but root
    assert energy.joules_of(lambda: None, "cpu", rapl, 0.02) is None


def test_a_busy_machine_is_noticed() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert quiet.wait_for_quiet(1.0) is False
    finally:
        busy.kill()
        busy.wait()


def test_how_long_to_wait_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESFUSE_QUIET_S")
    assert quiet.limit_s("cuda") < quiet.limit_s("cpu")
    monkeypatch.setenv("RESFUSE_QUIET_S", "1.5")
    assert quiet.limit_s("cpu") == 1.5
    for wrong in ("soon", "-1", "nan", "inf", ""):
        monkeypatch.setenv("RESFUSE_QUIET_S", wrong)
        with pytest.raises(UsageError, match=f"RESFUSE_QUIET_S: '{wrong}'; accepted: seconds"):
            quiet.limit_s("cpu")


def test_an_environment_is_the_same_until_something_changes() -> None:
    facts = machine.facts("cpu", 2)
    assert facts == machine.facts("cpu", 2)
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert machine.env_id(facts) == machine.env_id(dict(reversed(facts.items())))
    assert machine.env_id(facts) != machine.env_id(machine.facts("cpu", 1))


XEON = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 8
flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 avx512_fp16 amx_int8

processor\t: 1
flags\t\t: fpu
"""
GRAVITON = """processor\t: 0
Features\t: fp asimd asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("table", "model", "isa"),
    [
        (XEON, "family 6 model 143 stepping 8", "amx_bf16 amx_int8 avx512_fp16 avx512_bf16"),
        (GRAVITON, "implementer 0x41 part 0xd40", "sve i8mm bf16 asimddp"),
    ],
)
def test_processors_of_one_name_are_told_apart(
    table: str, model: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(table)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    found = machine.facts("cpu", 2)
    assert (found["cpu_model"], found["cpu_isa"]) == (model, isa)
    assert "(R)" not in found["cpu"]
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")  # not Linux
    assert processor.cpu_facts().keys() == {"cpu"}


@pytest.mark.parametrize(
    ("cpu", "model", "name"),
    [
        ("Intel Xeon Processor", "family 6 model 207 stepping 2",
         "intel-xeon-emerald-rapids-2-cores"),
        ("Intel Xeon Processor", "", "intel-xeon-2-cores"),
        ("AMD EPYC", "family 25 model 17 stepping 1", "amd-epyc-genoa-2-cores"),
        ("Intel Xeon CPU @ 2.20GHz", "family 6 model 85 stepping 7",
         "intel-xeon-cascade-lake-2-cores"),
        ("AMD EPYC 7763 64-Core Processor", "family 25 model 1 stepping 1",
         "amd-epyc-7763-milan-2-cores"),
        ("ARM Neoverse-V1", "implementer 0x41 part 0xd40", "arm-neoverse-v1-2-cores"),
    ],
)  # fmt: skip
def test_a_results_folder_is_named_as_a_person_would(cpu: str, model: str, name: str) -> None:
    facts = {"device": "cpu", "device_name": f"{cpu}, 2 cores", "cpu": cpu, "cpu_cores": "2"}
    assert machine.folder_name(facts | {"cpu_model": model}) == name


def test_a_gpu_gives_its_folder_the_name() -> None:
    """Of the processor beside it there is no word; versions are other environments in it."""
    facts = {"device": "cuda", "device_name": "NVIDIA H200 (SXM)", "cpu": "Intel Xeon Processor",
             "cpu_cores": "16", "torch": "2.11.0+cu128"}  # fmt: skip
    assert machine.folder_name(facts) == "nvidia-h200-sxm"


def test_a_commit_names_uncommitted_changes_but_not_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, stdout=-3)

    monkeypatch.setattr(machine, "SOURCES", tmp_path)
    git("init", "-q")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows.csv").write_text("a")
    git("add", ".")
    git("commit", "-qm", "a")
    clean = machine.commit()
    assert len(clean) == 12
    (tmp_path / "results" / "rows.csv").write_text("b")
    assert machine.commit() == clean
    git("commit", "-qam", "rows that came home change no sources")
    assert machine.commit() == clean
    (tmp_path / "a.py").write_text("b")
    changed = machine.commit()
    assert changed.startswith(f"{clean}+")
    (tmp_path / "a.py").write_text("c")
    assert machine.commit() not in (clean, changed)


def test_outside_of_git_the_version_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SOURCES", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("a")
    before = machine.commit()
    assert before.startswith("v")
    (tmp_path / "kernels" / "a.py").write_text("b")
    assert machine.commit() != before


def test_ceilings_are_rates_of_this_device() -> None:
    """A CPU has no tf32; what it has multiplies and copies at plausible rates."""
    found = {
        key: float(value) for key, value in machine.ceilings("cpu", ["float32", "tf32"]).items()
    }
    assert set(found) == {"ceiling_copy_gb_s", "ceiling_ieee_tflops"}
    assert 0.001 < found["ceiling_ieee_tflops"] < 100
    assert 0.5 < found["ceiling_copy_gb_s"] < 5000
