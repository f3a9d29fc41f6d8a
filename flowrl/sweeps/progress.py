"""Progress over all runs of a sweep, read from their metrics."""

from tqdm import tqdm

from flowrl.sweeps.plan import PlannedRun
from flowrl.sweeps.state import last_step


class SweepProgress:
    """One bar over the updates of all runs of a sweep."""

    def __init__(self, planned: list[PlannedRun], finished: list[PlannedRun]) -> None:
        self._steps = {run.name: run.config.steps for run in finished}
        for run in planned:
            self._steps.setdefault(run.name, min(last_step(run.run_dir), run.config.steps))
        self._runs, self._ended, self._failed = len(planned), len(finished), 0
        total = sum(run.config.steps for run in planned)
        self._shown = self.updates
        self._bar = tqdm(total=total, initial=self._shown, unit="update", disable=None)

    @property
    def updates(self) -> int:
        """Updates done so far, of all runs."""
        return sum(self._steps.values())

    def ended(self, run: PlannedRun, failure: str | None) -> None:
        """Count a run whose process ended, and say so."""
        self._ended += failure is None
        self._failed += failure is not None
        if failure is None:
            self._steps[run.name] = run.config.steps
        outcome = f"finished {run.name}" if failure is None else f"failed {failure}"
        tqdm.write(f"{outcome}; {self._ended} of {self._runs} finished")

    def show(self, running: list[PlannedRun]) -> None:
        """Bring the bar up to date with the metrics of the runs that go on."""
        for run in running:
            self._steps[run.name] = min(last_step(run.run_dir), run.config.steps)
        self._bar.set_postfix(finished=f"{self._ended}/{self._runs}", failed=self._failed, refresh=False)
        self._bar.update(self.updates - self._shown)
        self._shown = self.updates

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
