"""The life that an attempt is of its job: told early, and refused a next one where that leads
nowhere.
"""

from collections.abc import Mapping
from pathlib import Path

from ddp_kit.distributed.failure import Failure
from ddp_kit.distributed.topology import is_first_rank
from ddp_kit.io.json_lines import read_json
from ddp_kit.lifecycle.history import (
    CLAIM,
    NoProgressError,
    fruitless,
    job_facts,
    lives_of_job,
    note,
    require_progress_so_far,
)
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.lifecycle.start import RunPlace
from ddp_kit.stopping.signals import REQUEUE, Stopped
from ddp_kit.training.loop import Ending


class JobLife:
    """One life of a job, on this rank."""

    def __init__(self, path: Path) -> None:
        """Args: `path` the run directory."""
        self._path = path
        # As it was before a rank of it could leave word.
        self._job = job_facts(path)
        self._is_noted = False
        # What the run directory tells, once this life has claimed it, and at which step it began.
        self.place: RunPlace | None = None
        self.began: int | None = None

    def require_progress_so_far(self, end: BaseException) -> None:
        """Called on an end before the first step.

        Raises: NoProgressError in its place if it would have the job started again, and that leads
            nowhere.
        """
        if not isinstance(end, Stopped) or end.code != REQUEUE:
            return
        self._note_unclaimed(end)
        if self.place is not None:
            starts = list(self.place.starts)
            endings = list(self.place.endings)
        else:
            lives = fruitless(lives_of_job(self._path, self._job))
            starts = [life.step for life in lives]
            endings = [life.ending for life in lives]
        try:
            require_progress_so_far(starts, began=self.began, endings=[*endings, str(end)])
        except NoProgressError as circle:
            if self.place is None and is_first_rank():
                directory = RunDir(self._path)
                step = step_in(read_json(self._path / "status.json"))
                directory.status("failed", reason=str(circle), step=step, exit_code=1)
            raise

    def require_new_step(self, ending: Ending, *, step: int) -> None:
        """Called on an end that all ranks agree on. Raises: NoProgressError as above."""
        if ending.exit_code != REQUEUE or step != self.began or self.place is None:
            return
        endings = [*self.place.endings, ending.reason]
        require_progress_so_far(self.place.starts, began=self.began, endings=endings)

    def note_early(self, failure: Failure) -> None:
        """Leaves word of a failure before there is a reporter, where lives are counted."""
        if self.place is not None and self.place.job:
            note(self.place.path, "failure", {}, message=failure.reason)

    def _note_unclaimed(self, end: BaseException) -> None:
        """Leaves word, once, of a life that ends before it has the run directory."""
        if self.place is None and self._job and not self._is_noted and is_first_rank():
            self._path.mkdir(parents=True, exist_ok=True)
            note(self._path, CLAIM, self._job)
            note(self._path, "stop", {}, message=str(end))
            self._is_noted = True


def step_in(status: Mapping[str, object]) -> int:
    """Returns the step of a status.json, 0 without one."""
    found = status.get("step", 0)
    return found if isinstance(found, int) else 0
