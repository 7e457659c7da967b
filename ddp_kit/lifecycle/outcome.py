"""What one life of a run leaves behind, however it ends.

Owns: what was asked for, the parts of the run as they come to be, and status.json at the end; a
failure finds here what to write down. Refuses: running anything.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ddp_kit.checkpoint.checkpointer import Checkpointer
from ddp_kit.checkpoint.format.writer import Saved
from ddp_kit.distributed.failures import Verdict
from ddp_kit.io.json_lines import read_json
from ddp_kit.io.logs import logger
from ddp_kit.lifecycle.run_dir import RunDir, Status
from ddp_kit.lifecycle.session import exit_code
from ddp_kit.lifecycle.start import Place, resume_command
from ddp_kit.recipe import RecipeSource
from ddp_kit.settings import Settings
from ddp_kit.setup.build import Composition
from ddp_kit.stopping.grace_period import Grace
from ddp_kit.stopping.signals import REQUEUE, Stop, StopFlag, Stopped
from ddp_kit.stopping.stop_watcher import Watch
from ddp_kit.training.loop import Ending
from ddp_kit.training.reporter import Reporter
from ddp_kit.training.state import Training

STATUS_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, the same on every rank; `model` holds the last weights (with fsdp and
    deepspeed 3 this rank's part of them).
    """

    status: str
    reason: str
    exit_code: int
    step: int
    metrics: Mapping[str, float]
    weights_sha256: str
    run_dir: Path
    model: nn.Module


@dataclass(kw_only=True)
class Life:
    """A life of a run on this rank. `source` and `args` are those of a command; there are none from
    Python.
    """

    settings: Settings
    name: str
    source: RecipeSource | None = None
    args: Sequence[str] = ()
    began: float = field(default_factory=time.monotonic)
    stop: StopFlag = field(default_factory=StopFlag)
    directory: RunDir | None = None  # rank 0 only
    place: Place | None = None
    composition: Composition | None = None
    reporter: Reporter | None = None  # once this life has begun
    metrics: dict[str, float] = field(default_factory=dict)
    grace: Grace | None = None
    watch: Watch | None = None  # rank 0 only
    told: Mapping[str, object] | None = (
        # The content of status.json after a failure, where this rank has written it.
        None
    )

    def watches(self, training: Training) -> None:
        """From now on a stop is looked for, and measured. Whoever calls it calls `close`."""
        self.grace, checkpoints = (
            Grace(training.control, training.group.topology),
            training.checkpoints,
        )
        assert isinstance(checkpoints, Checkpointer)
        if self.directory is not None:
            hours = self.settings.max_hours
            end = self.began + 3600 * hours if hours else math.inf
            self.watch = Watch(
                self.directory.path, self.stop, checkpoints=checkpoints, grace=self.grace, end=end
            )

    def close(self) -> None:
        """Ends the watch."""
        if self.watch is not None:
            self.watch.close()

    def saved(self, save: Saved) -> None:
        """Takes a save that has ended: tells of it, and what a stop needs now."""
        assert self.reporter is not None
        tell_of_save(self.reporter, save)
        if save.error or self.grace is None:
            return
        self.grace.saved(save.seconds)
        if statement := self.grace.statement():
            logger.info("%s", statement)
            self.reporter.event("grace", step=save.step, message=statement)
        if warning := self.grace.warning():
            logger.warning("%s", warning)
        if self.watch is not None and self.watch.saved():
            self.reporter.event("acknowledged", step=save.step, message="the file SAVE")

    @property
    def advice(self) -> str:
        """What to type to go on with the run; "" if there is nothing to go on from."""
        if self.composition is None or self.place is None or not self.args:
            return ""
        training = self.composition.training
        saved = training.checkpoints.committed_step if training.checkpoints is not None else -1
        command = resume_command(self.args, self.place.path, training.group.topology)
        return f"to go on from step {saved}: {command}" if saved > 0 else ""

    def failed(self, verdict: Verdict) -> None:
        """Leaves a failure in the run directory. If rank 0 is the one that died, the first of its
        peers does. What an earlier life left stays until this one has begun.
        """
        if self.place is not None and self.place.earlier and self.reporter is None:
            return
        if self.directory is not None:
            self._write(self.directory, verdict)
        elif isinstance(verdict.error, Stopped) and self.place is not None:
            self._await_status(self.place.path)
        elif verdict.is_silent and self.place is not None:
            directory = RunDir(self.place.path)
            with directory.inherited() as is_heir:
                if is_heir and read_json(directory.path / "status.json").get("status") == "running":
                    self._write(directory, verdict)

    def _await_status(self, path: Path) -> None:
        """A launcher may end rank 0 for this rank's exit code: it gets the time to write down how
        the run ended.
        """
        end = time.monotonic() + STATUS_S
        while read_json(path / "status.json").get("status") == "running" and time.monotonic() < end:
            time.sleep(0.05)

    def _write(self, directory: RunDir, verdict: Verdict) -> None:
        error, reason = verdict.error, verdict.reason
        status: Status = "failed"
        if isinstance(error, Stopped) and verdict.is_own:
            status = "preempted" if error.stop.is_preemption else "stopped"
        step = self.composition.training.step if self.composition else 0
        self.told = {"status": status, "reason": reason, "step": step}
        try:
            self.told = directory.status(
                status, reason=reason, step=step, metrics=self.metrics, exit_code=exit_code(error)
            )
        except OSError as failure:  # a full disk, which may be why this life failed
            logger.warning("status.json could not be written: %s", failure)

    def mourned(self, verdict: Verdict) -> None:
        """Tells the trackers of a failure that has been written down, and a person how to go on."""
        if self.told is None:
            return
        if self.reporter is not None:
            kind = "failure" if self.told["status"] == "failed" else "stop"
            step = self.composition.training.step if self.composition else 0
            self.reporter.event(kind, step=step, rank=verdict.culprit, message=verdict.reason)
            self.reporter.finish(self.told)
        if self.advice:
            sys.stderr.write(f"{self.advice}\n")

    def ended(self, ending: Ending, *, digest: str) -> Outcome:
        """Leaves an ending that all ranks agreed on."""
        assert self.composition is not None
        assert self.reporter is not None
        training, steps = self.composition.training, self.composition.pace.steps_per_epoch
        if self.directory is not None:
            status = self.directory.status(
                ending.status,
                reason=ending.reason,
                step=training.step,
                epoch=training.step // steps if steps else 0,
                metrics=self.metrics,
                weights_sha256=digest,
                exit_code=ending.exit_code,
            )
            if ending.exit_code == REQUEUE:
                self.directory.ask_requeue(ending.reason)
            if self.watch is not None and ending.stop is Stop.FILE and self.watch.take("STOP"):
                self.reporter.event("acknowledged", step=training.step, message="the file STOP")
            self.reporter.event(
                "finish" if ending.status == "finished" else "stop",
                step=training.step,
                message=ending.reason,
            )
            self.reporter.finish(status)
            if ending.status != "finished" and self.advice:
                logger.info("%s", self.advice)
        return self.outcome(ending, metrics=self.metrics, digest=digest)

    def outcome(self, ending: Ending, *, metrics: Mapping[str, float], digest: str) -> Outcome:
        """Returns an ending as `run` hands it to its caller."""
        assert self.composition is not None
        assert self.place is not None
        return Outcome(
            status=ending.status,
            reason=ending.reason,
            exit_code=ending.exit_code,
            step=self.composition.training.step,
            metrics=dict(metrics),
            weights_sha256=digest,
            run_dir=self.place.path,
            model=self.composition.training.model,
        )


def tell_of_save(reporter: Reporter, save: Saved) -> None:
    """Writes down a save that has ended. A failed one is said as a warning, and training goes on."""
    said = save.error or save.note
    if said:
        logger.warning("checkpoint of step %s: %s", save.step, said)
    if save.error:
        reporter.event("save_failed", step=save.step, message=save.error)
        return
    words = f"{save.nbytes / 2**20:.1f} MiB in {save.seconds:.2f} s"
    reporter.event("save", step=save.step, message=f"{words}; {save.note}" if save.note else words)
