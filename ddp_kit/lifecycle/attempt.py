"""One attempt of a run on this rank: what was asked for, how far it has come, and what a failure
leaves behind.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddp_kit.checkpoint.checkpointer import Checkpointer
from ddp_kit.checkpoint.format.writer import Saved
from ddp_kit.distributed.early_boundary import EarlyBoundary
from ddp_kit.distributed.failure import Failure
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.io.json_lines import read_json
from ddp_kit.io.logs import logger
from ddp_kit.io.polling import wait_until
from ddp_kit.lifecycle.history import NoProgressError
from ddp_kit.lifecycle.job_lives import JobLife, step_in
from ddp_kit.lifecycle.reporters import tell_of_save
from ddp_kit.lifecycle.resume_command import resume_command
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.lifecycle.session import HANG, code_of
from ddp_kit.lifecycle.start import RunPlace
from ddp_kit.lifecycle.status import Status, status_content
from ddp_kit.recipe import Recipe, RecipeSource
from ddp_kit.settings import Settings
from ddp_kit.setup.build import Built
from ddp_kit.stopping.departure import Departure, Pace
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.grace_period import GracePeriod
from ddp_kit.stopping.signals import Stop, StopFlag, Stopped
from ddp_kit.stopping.stop_watcher import StopWatcher
from ddp_kit.training.reporter import Reporter
from ddp_kit.watchdog.ending import HUNG

STATUS_S = 3.0
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for. `source` and `args` are those of a command; there are none from Python.
    `began` is when the process did, by `time.monotonic()`.
    """

    settings: Settings
    name: str
    source: RecipeSource | None = None
    args: Sequence[str] = ()
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The parts of an attempt, made once, before a checkpoint is read into them."""

    request: Request
    stop: StopFlag
    directory: RunDir | None  # rank 0 only
    place: RunPlace
    recipe: Recipe
    built: Built
    reporter: Reporter
    early_stopping: EarlyStopping


class Attempt:
    """How far an attempt has come: a failure at any time finds here what to write, and where."""

    def __init__(self, request: Request, stop: StopFlag, *, life: JobLife) -> None:
        self.request = request
        self.stop = stop
        self.life = life
        stop.on_second = self.left_at_once
        self.group: Group | None = None
        self.directory: RunDir | None = None  # rank 0 only
        self.place: RunPlace | None = None
        self.context: RunContext | None = None
        self.has_begun = False  # from then on the run directory tells of this attempt
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.stop_watcher: StopWatcher | None = None  # rank 0 only
        self._grace_period: GracePeriod | None = None
        self._early_boundary: EarlyBoundary | None = None
        # The content of status.json after a failure, where this rank has written it.
        self._told: Mapping[str, object] | None = None

    def watch_for_stops(self, context: RunContext) -> None:
        """From now on a stop is looked for, and measured. Whoever calls it calls `close`.

        Raises: ConfigError if the environment's grace period is no number.
        """
        training = context.built.training
        checkpointer = training.checkpoints
        assert isinstance(checkpointer, Checkpointer)
        group = training.group
        self._grace_period = GracePeriod(training.control_packet, group.topology)
        if group.store is not None:
            self._early_boundary = EarlyBoundary(training.control_packet, group, group.store)
            self.stop.hurry = self._early_boundary.ask
        if context.directory is None:
            return
        end = math.inf
        if self.request.settings.max_hours:
            end = self.request.began + 3600 * self.request.settings.max_hours
        self.stop_watcher = StopWatcher(
            context.directory.path,
            self.stop,
            checkpoints=checkpointer,
            grace_period=self._grace_period,
            end=end,
        )

    def pace(self) -> Pace:
        """Returns how far the loop is. Any thread may ask."""
        if self._grace_period is None or not self.stop.deferring:
            return Pace()
        return self._grace_period.pace()

    def departed(self, departure: Departure) -> None:
        """Writes down that this process ends itself, since nothing moves. A thread calls it."""
        if self.directory is not None and self.directory.is_running:
            status: Status = "failed"
            if departure.exit_code != HANG:
                status = "preempted" if departure.stop.is_preemption else "stopped"
            self._leave_last(status, departure.reason, departure.exit_code)
        sys.stderr.write(f"{departure.reason}\n")
        sys.stderr.flush()
        if self.group is not None:
            self.group.failure_report.tell(DdpKitError(departure.reason))

    def left_at_once(self, stop: Stop) -> None:
        """Writes down that a second signal ends this process."""
        if self.directory is None or not self.directory.is_running:
            return
        status: Status = "preempted" if stop.is_preemption else "stopped"
        code = 128 + signal.Signals[stop.name]
        self._leave_last(status, f"a second {stop.name}: left at once", code)

    def _leave_last(self, status: Status, reason: str, code: int) -> None:
        assert self.directory is not None
        content = status_content(
            status, reason=reason, step=self.step, metrics=self.metrics, exit_code=code
        )
        with contextlib.suppress(OSError):
            self.directory.leave_status(content)

    def close(self) -> None:
        """Ends the watch."""
        if self.stop_watcher is not None:
            self.stop_watcher.close()
        if self._early_boundary is not None:
            self._early_boundary.close()

    def saved(self, save: Saved) -> None:
        """Takes a save that has ended: tells of it, and what a stop needs now."""
        assert self.context is not None
        reporter = self.context.reporter
        tell_of_save(reporter, save)
        if save.error or self._grace_period is None:
            return
        self._grace_period.saved(save.seconds)
        statement = self._grace_period.statement()
        if statement:
            logger.info("%s", statement)
            reporter.event("grace", step=save.step, message=statement)
        warning = self._grace_period.warning()
        if warning:
            logger.warning("%s", warning)
        if self.stop_watcher is not None and self.stop_watcher.saved():
            reporter.event("acknowledged", step=save.step, message="the file SAVE")

    def heed_verdicts(self, group: Group) -> None:
        """From now on a watchdog leaves stacks and its verdict in the run directory."""
        assert self.place is not None
        group.pulse.stacks = self.place.path / "stacks"
        group.pulse.on_verdict = self.hung

    def hung(self, text: str, rank: int) -> None:
        """Leaves a verdict in the run directory. A watchdog's thread of one rank calls it: rank 0's
        if that can.
        """
        assert self.place is not None
        if self.directory is not None:
            self._write_verdict(self.directory, text)
            if self.has_begun and self.context is not None and self._told is not None:
                reporter = self.context.reporter
                reporter.event("failure", step=self.step, rank=rank, message=text)
            self.directory.release()
            return
        directory = RunDir(self.place.path)
        with directory.inherited():
            self._write_verdict(directory, text)

    def _write_verdict(self, directory: RunDir, text: str) -> None:
        self._told = directory.status(
            "failed", reason=text, step=self.step, metrics=self.metrics, exit_code=HUNG
        )

    @property
    def step(self) -> int:
        """The steps that are done."""
        if self.context is None:
            return 0
        return self.context.built.training.step

    @property
    def advice(self) -> str:
        """What to type to go on with the run; "" if there is nothing to go on from."""
        if self.context is None or not self.request.args:
            return ""
        training = self.context.built.training
        checkpointer = training.checkpoints
        if not isinstance(checkpointer, Checkpointer):
            return ""
        step = checkpointer.newest_whole()
        if step <= 0:
            return ""
        command = resume_command(
            self.request.args, self.context.place.path, training.group.topology
        )
        return f"to go on from step {step}: {command}"

    def failed(self, failure: Failure) -> None:
        """Leaves a failure in the run directory. If rank 0 is the one that died, the first of its
        peers does. What an earlier attempt left stays until this one has begun.
        """
        if self._early_boundary is not None:
            # The store may go with the ranks.
            self._early_boundary.close()
        is_circle = isinstance(failure.error, NoProgressError)
        if self.directory is not None and not self.has_begun:
            self.life.note_early(failure)
        if self.place is not None and self.place.earlier and not (self.has_begun or is_circle):
            return
        if self.directory is not None:
            self._write(self.directory, failure)
        elif isinstance(failure.error, Stopped) and self.place is not None:
            _await_status(self.place.path)
        elif failure.is_hang and self.place is not None:
            # Rank 0 lives and may have stopped: it could not write this.
            if _status_of(self.place.path) == "running":
                self._write(RunDir(self.place.path), failure)
        elif failure.is_silent and self.place is not None:
            directory = RunDir(self.place.path)
            with directory.inherited() as is_heir:
                if is_heir and _status_of(directory.path) == "running":
                    self._write(directory, failure)

    def _write(self, directory: RunDir, failure: Failure) -> None:
        error = failure.error
        reason = failure.reason
        status: Status = "failed"
        if isinstance(error, Stopped) and failure.is_own:
            status = "preempted" if error.stop.is_preemption else "stopped"
        step = self.step
        if not self.has_begun and self.place is not None:
            step = step_in(self.place.earlier)
        self._told = {"status": status, "reason": reason, "step": step}
        try:
            self._told = directory.status(
                status,
                reason=reason,
                step=step,
                metrics=self.metrics,
                exit_code=code_of(failure),
            )
        except OSError as fault:
            # A full disk, which may be why this attempt failed.
            logger.warning("status.json could not be written: %s", fault)

    def after_failure(self, failure: Failure) -> None:
        """Tells the trackers of a failure that has been written down, and a person how to go on."""
        if self._told is None:
            return
        if self.has_begun and self.context is not None:
            reporter = self.context.reporter
            kind = "failure" if self._told["status"] == "failed" else "stop"
            reporter.event(kind, step=self.step, rank=failure.culprit, message=failure.reason)
            reporter.finish(self._told)
        advice = self.advice
        if advice:
            sys.stderr.write(f"{advice}\n")


def _status_of(path: Path) -> object:
    return read_json(path / "status.json").get("status")


def _await_status(path: Path) -> None:
    """A launcher may end rank 0 for this rank's exit code: it gets the time to write down how the
    run ended.
    """
    wait_until(lambda: _status_of(path) != "running", within_s=STATUS_S, pause_s=POLL_S)
