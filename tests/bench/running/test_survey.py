"""What the survey of a machine measures, and how often."""

import pytest

from resfuse.bench.common.errors import UsageError
from resfuse.bench.measuring.probes import machine, noise
from resfuse.bench.running.survey import ROUNDS_VARIABLE, take_survey

JOB = {
    "threads": 1,
    "ceilings": True,
    "request": {"profile": "quick", "device": "cpu", "models": ["cifar_resnet20"],
                "backends": ["eager"], "batch_sizes": [1], "precisions": ["float32"],
                "memory_formats": [], "modes": ["inference"], "img_size": None,
                "baseline": "eager", "baseline_memory_format": "contiguous", "weights": "seeded",
                "images": "bundled"},
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds of the survey's five loops, which are not run."""
    rounds: list[int] = []

    def fastest_ms(work: object, kind: str, count: int) -> float:
        rounds.append(count)
        return 1.0

    def paired_times(device: str, count: int, *rest: float) -> tuple[list[float], list[float]]:
        rounds.append(count)
        return [1.0] * count, [1.0] * count

    monkeypatch.setattr(machine, "_fastest_ms", fastest_ms)
    monkeypatch.setattr(noise, "_paired_times", paired_times)
    return rounds


@pytest.mark.parametrize(("said", "rounds"), [(None, [12, 12, 12, 12, 20]), ("3", [3, 3, 3, 3, 6])])
def test_the_environment_may_ask_for_fewer_rounds(
    said: str | None, rounds: list[int], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ROUNDS_VARIABLE)
    if said is not None:
        monkeypatch.setenv(ROUNDS_VARIABLE, said)
    found = take_survey(JOB, None)
    assert asked == rounds
    assert float(found["ceilings"]["ceiling_copy_gb_s"]) > 0 and found["interval"] == 0


@pytest.mark.parametrize("wrong", ["0", "1", "-3", "2.5", "", "many"])
def test_wrong_rounds_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROUNDS_VARIABLE, wrong)
    with pytest.raises(UsageError, match=f"{ROUNDS_VARIABLE}: '{wrong}'; accepted: whole numbers"):
        take_survey(JOB, None)
