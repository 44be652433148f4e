"""Memory, energy, clocks, environment: real on the CPU, stand-ins for what only a GPU has."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from resfuse.bench import energy, machine, memory, nvml, processor, quiet
from resfuse.bench.errors import UsageError

MEGABYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_a_step_needs_at_its_worst() -> None:
    """A step that holds 256 MB for a moment; the 64 MB made before it are not its own."""
    before_all = torch.ones(64 * MEGABYTE // 4)
    before = memory.held("cpu")
    peak = memory.peak_of(lambda: torch.ones(256 * MEGABYTE // 4).sum(), "cpu", before)
    assert before is not None and peak.peak is not None and peak.reserved is not None
    assert 250 * MEGABYTE < peak.peak < 300 * MEGABYTE
    assert peak.reserved > peak.peak + before_all.numel() * 4
    idle = memory.peak_of(lambda: None, "cpu", memory.held("cpu"))
    assert idle.peak is not None and idle.peak < 20 * MEGABYTE


def test_peak_memory_is_empty_where_the_system_does_not_say() -> None:
    assert memory.peak_of(lambda: None, "cpu", None) == memory.Memory(None, None)


def test_gpu_memory_comes_from_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for torch's CUDA allocator: 300 MB before the model, 1000 MB at the peak."""
    calls: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 1200)
    peak = memory.peak_of(lambda: calls.append("step"), "cuda", 300)
    assert peak == memory.Memory(700, 1200)
    assert calls == ["synchronize", "reset_peak_memory_stats", "step", "synchronize"]


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
    """A counter that gains 500 mJ a step; what came before the first reading does not count."""
    counter = [123_000]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(nvml, "read", lambda function: counter[0])

    def step() -> None:
        counter[0] += 500

    assert energy.joules_of(step, "cuda", seconds_s=0.02) == pytest.approx(0.5)


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


def test_the_folders_name_says_device_and_versions() -> None:
    facts = {"device_name": "NVIDIA H200 (SXM)", "torch": "2.11.0+cu128", "triton": "3.6.0"}
    assert machine.folder_name(facts) == "nvidia-h200-sxm-torch2.11.0-triton3.6.0"
    del facts["triton"]
    assert machine.folder_name(facts).endswith("-tritonnone")


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
