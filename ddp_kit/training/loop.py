"""The loop: the order of things at a step boundary.

Step, control packet and what it decides, record, callbacks, evaluation, save. What each of these
does is said elsewhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ddp_kit.data.cursor import Cursor
from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.distributed.control_packet import Decision
from ddp_kit.distributed.pulse import Phase
from ddp_kit.recipe import Callback
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.signals import Abandoned, Stop, StopFlag
from ddp_kit.training.agreement import Sentinel, require_agreement
from ddp_kit.training.nonfinite import look_back
from ddp_kit.training.reporter import Reporter
from ddp_kit.training.state import Training
from ddp_kit.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When things happen, in optimizer steps.

    `steps_per_epoch` is 0 where an iterable data set does not know its length; `cursor` says in
    which epoch a step is.
    """

    end: int
    steps_per_epoch: int
    cursor: Cursor = field(default_factory=Cursor)
    eval_every: int = 0
    save_every: int = 0

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps: every `eval_every`, at every epoch's end
        and at the end."""
        return self._is_due(step, every=self.eval_every)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps: every `save_every`, at every epoch's end
        and at the end."""
        return self._is_due(step, every=self.save_every)

    def last_epoch(self, step: int) -> int:
        """Returns the epoch of the last of `step` steps, 0 where epochs have no known length."""
        return self.cursor.epoch(step - 1, steps_per_epoch=self.steps_per_epoch)

    def _is_due(self, step: int, *, every: int) -> bool:
        if step == self.end:
            return True
        batches = self.cursor.batches(step)
        if self.steps_per_epoch > 0 and batches % self.steps_per_epoch == 0:
            return True
        return every > 0 and step % every == 0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the loop ended."""

    status: Literal["finished", "stopped", "preempted"]
    reason: str
    exit_code: int = 0
    stop: Stop = Stop.NONE


def fit(
    training: Training,
    batches: Iterable[RankBatch],
    *,
    cadence: Cadence,
    report: Reporter,
    evaluate: Callable[[int], dict[str, float]],
    early_stopping: EarlyStopping,
    stop: StopFlag,
    callbacks: Sequence[Callback] = (),
    owes_evaluation: bool = False,
) -> Ending:
    """Trains on `batches` to the end of `cadence`, an early stop or a stop from outside.

    Every rank calls it; all leave at the same step. Saves go to `training.checkpoints`.

    Args:
        evaluate: of an epoch: its metrics, alike on all ranks ({} without data); raises Abandoned.
        owes_evaluation: the attempt before was stopped at a step that should have had one.

    Raises: NonFiniteError on every rank if a loss or gradient is not finite and nothing else was
        asked for; RollBack on every rank if the run is to go back to its last checkpoint.
    """
    stop.deferring = True
    first = training.step
    checkpoints = training.checkpoints
    sentinel = Sentinel(training, every=training.check_every)
    measure = _Measure(training, evaluate, report, early_stopping, callbacks)
    ending = stopped(training.control_packet.exchange(stop=stop.stop))
    if owes_evaluation and ending is None:
        ending = _catch_up(training, measure, epoch=cadence.last_epoch(first))
    if ending is not None:
        return ending
    for batch in batches:
        sums = train_step(training, batch)
        step = training.step
        is_save_due = checkpoints is not None and checkpoints.is_due()
        decision = training.control_packet.boundary(stop=stop.stop, saves=is_save_due)
        is_last = step == cadence.end
        report.step(training, sums, epoch=batch.epoch, wait_s=batch.wait_s, is_last=is_last)
        if step == first + 1:
            training.after_first_step()
        for callback in callbacks:
            callback.on_step(step)
        if checkpoints is not None:
            checkpoints.report()
        saves = decision.saves or cadence.saves(step)
        evaluates = cadence.evaluates(step) and not decision.stop
        is_pause = bool(decision.stop) or saves or evaluates
        sentinel.look(is_compared=is_pause)
        if not is_pause:
            continue
        ending = _pause(
            measure, decision, stop, saves=saves, evaluates=evaluates, epoch=batch.epoch
        )
        if ending is not None:
            return ending
    return _finished(early_stopping)


@dataclass(frozen=True)
class _Measure:
    """An evaluation after the current step, with all that hears of it."""

    training: Training
    evaluate: Callable[[int], dict[str, float]]
    report: Reporter
    early_stopping: EarlyStopping
    callbacks: Sequence[Callback]

    def __call__(self, epoch: int) -> tuple[dict[str, float], Ending | None]:
        """Evaluates. Returns the metrics, and how the run ends, if it ends here."""
        step = self.training.step
        require_agreement(self.training)
        try:
            with self.training.group.pulse.during(Phase.EVALUATION):
                metrics = self.evaluate(epoch)
        except Abandoned as abandoned:
            return {}, stopped(abandoned.decision)
        self.training.group.pulse.go_on(Phase.CALLBACK)
        if metrics:
            for callback in self.callbacks:
                callback.on_evaluation(step, metrics)
        self.report.restart_clock(step)
        if metrics and self.early_stopping.update(metrics, step=step):
            return metrics, _finished(self.early_stopping)
        return metrics, None


def _pause(
    measure: _Measure,
    decision: Decision,
    stop: StopFlag,
    *,
    saves: bool,
    evaluates: bool,
    epoch: int,
) -> Ending | None:
    """Evaluates and saves, as far as these are due. Returns how the run ends, if it ends here."""
    training = measure.training
    checkpoints = training.checkpoints
    # What is on its way over ranks comes before an evaluation, a save or an end.
    training.group.pulse.go_on(Phase.CONTROL)
    look_back(training)
    measure.report.flush()
    metrics: dict[str, float] = {}
    ending = stopped(decision)
    if evaluates:
        metrics, ending = measure(epoch)
    stop.is_settled = ending is not None
    if checkpoints is not None:
        checkpoints.after(metrics, is_due=saves or stop.is_settled)
    return ending


def _catch_up(training: Training, measure: _Measure, *, epoch: int) -> Ending | None:
    """Makes up for an evaluation that the attempt before owes, and saves its metrics with the
    step. Returns how the run ends, if it ends here."""
    metrics, ending = measure(epoch)
    if training.checkpoints is not None and metrics:
        training.checkpoints.save(metrics, again=True)
    return ending


def _finished(early_stopping: EarlyStopping) -> Ending:
    reason = ""
    if early_stopping.is_over:
        reason = f"stopped early: {early_stopping.reason}"
    return Ending(status="finished", reason=reason)


def stopped(decision: Decision) -> Ending | None:
    """Returns the ending that all ranks agreed on, None if they did not."""
    stop = Stop(decision.stop)
    if not stop:
        return None
    return Ending(
        status="preempted" if stop.is_preemption else "stopped",
        reason=stop.words(decision.stop_rank),
        exit_code=stop.exit_code,
        stop=stop,
    )
