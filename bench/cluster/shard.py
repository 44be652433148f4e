"""The work of one job, pickled here and called on the machine that runs the job."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from resfuse.bench.common.errors import UsageError
from resfuse.bench.records import results
from resfuse.bench.records.case import Case, Options, Request
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running import sweep
from resfuse.bench.running.survey import survey

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class Shard:
    cases: tuple[Case, ...]
    request: Request  # what they came from
    options: Options
    folder: Path  # results of this job alone
    settled: Path | None  # results whose settled cases are left out, too

    def __call__(self) -> str:
        """Measures what is left of the cases; returns what was wrong with the input, or nothing.

        Called again after a preemption: then what its own folder has settled is left out.
        """
        try:
            self._run()
        except UsageError as error:
            return str(error)
        return ""

    def checkpoint(self) -> "DelayedSubmission":
        """Returns what submitit queues again when the job is preempted: the same job, for rows are
        kept as they come."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self) -> None:
        found = survey(self._own_request(), self.options.threads, ceilings=True)
        folder = self.folder / found["folder"]
        known = [folder] if self.settled is None else [folder, self.settled / found["folder"]]
        cases = list(self.cases)
        for one in known:
            cases = sweep.unsettled(cases, one, found)
        found = results.record_survey(folder, found)
        print(f"{found['facts']['device_name']}: {len(cases)} of {len(self.cases)} cases to do")
        sweep.run(cases, self.options, folder, found, _started, _finished)

    def _own_request(self) -> Request:
        """Returns a request for the survey, with the weights and ceilings of these cases alone."""
        return replace(
            self.request,
            models=sorted({case.model for case in self.cases}),
            precisions=sorted({case.precision for case in self.cases}),
        )


def _started(case: Case) -> None:
    print(case.label(), flush=True)


def _finished(case: Case, outcome: Outcome) -> None:
    print(f"{case.label()}: {outcome.status} {outcome.error}", flush=True)
