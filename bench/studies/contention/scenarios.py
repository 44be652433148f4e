"""SCENARIOS: what else uses the cores while a network is timed."""

from dataclasses import dataclass

NICE = 10  # the priority of a background job (`nice` without an argument)


@dataclass(frozen=True)
class Scenario:
    """Busy processes beside the measured one, and the threads that call it.

    Attributes:
        neighbours: processes that never rest.
        nice: their priority: 0 is normal, 10 that of a background job.
        pinned: they share the first CPU; else the scheduler places them.
        callers: Python threads of the measured process, each with a network of its own.
    """

    neighbours: int = 0
    nice: int = 0
    pinned: bool = False
    callers: int = 1

    @property
    def title(self) -> str:
        if not self.neighbours:
            return "alone" if self.callers == 1 else f"{self.callers} networks in threads"
        priority = f"nice {self.nice}" if self.nice else "normal"
        place = ", pinned to one CPU" if self.pinned else ""
        return f"beside {self.neighbours} ({priority}{place})"


QUIET = "quiet"
SCENARIOS = {
    QUIET: Scenario(),
    "normal1": Scenario(1),
    "normal2": Scenario(2),
    "nice1": Scenario(1, NICE),
    "nice2": Scenario(2, NICE),
    "normal1-pinned": Scenario(1, pinned=True),
    "normal2-pinned": Scenario(2, pinned=True),
    "nice1-pinned": Scenario(1, NICE, pinned=True),
    "nice2-pinned": Scenario(2, NICE, pinned=True),
    "callers2": Scenario(callers=2),
    "callers4": Scenario(callers=4),
}
