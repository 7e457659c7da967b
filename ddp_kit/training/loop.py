"""The loop.

Owns: the order of things at a step boundary: step, packet, record, evaluation, decision.
Refuses: everything else. It fits on one screen.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ddp_kit.data.loader import RankBatch
from ddp_kit.distributed.control_packet import Decision
from ddp_kit.recipe import Callback
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.signals import Abandoned, Stop, StopFlag
from ddp_kit.training.nonfinite import look_back
from ddp_kit.training.reporter import Reporter
from ddp_kit.training.state import Training
from ddp_kit.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When things happen, in optimizer steps. `steps_per_epoch` is 0 where an iterable data set does not know its length."""

    end: int
    steps_per_epoch: int
    eval_every: int = 0
    save_every: int = 0

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps: every `eval_every`, at every epoch's end and at the end."""
        return self._is_due(step, every=self.eval_every)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps: every `save_every`, at every epoch's end and at the end."""
        return self._is_due(step, every=self.save_every)

    def _is_due(self, step: int, *, every: int) -> bool:
        at_epoch = self.steps_per_epoch > 0 and step % self.steps_per_epoch == 0
        return step == self.end or at_epoch or (every > 0 and step % every == 0)


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
    pace: Pace,
    report: Reporter,
    evaluate: Callable[[int], dict[str, float]],
    early_stopping: EarlyStopping,
    stop: StopFlag,
    callbacks: Sequence[Callback] = (),
    owes_evaluation: bool = False,
) -> Ending:
    """Trains on `batches` to the end of `pace`, an early stop or a stop from outside. Every rank calls it; all leave at the same step.

    `evaluate(epoch)` returns the metrics of an evaluation after the current step, the same on all ranks ({} without eval data), or raises
    Abandoned; `owes_evaluation`: the life before was stopped at a step that should have had one. Saves go to `training.checkpoints`.
    """
    stop.deferring = True
    first, checkpoints, control = training.step, training.checkpoints, training.control

    def measured(
        epoch: int,
    ) -> tuple[dict[str, float], Ending | None]:  # and how the run ends, if it ends here
        try:
            metrics = evaluate(epoch)
        except Abandoned as abandoned:
            return {}, stopped(abandoned.decision)
        for callback in callbacks if metrics else ():
            callback.on_evaluation(training.step, metrics)
        report.restart_clock(training.step)
        is_over = bool(metrics) and early_stopping.update(metrics, step=training.step)
        return metrics, _finished(early_stopping) if is_over else None

    ending = stopped(control.exchange(stop=stop.stop))
    if owes_evaluation and ending is None:
        metrics, ending = measured(
            (first - 1) // pace.steps_per_epoch if pace.steps_per_epoch else 0
        )
        if checkpoints is not None and metrics:
            checkpoints.save(metrics, again=True)
    if ending is not None:
        return ending
    for batch in batches:
        sums = train_step(training, batch)
        step = training.step
        decision = control.boundary(
            stop=stop.stop, saves=checkpoints is not None and checkpoints.is_due()
        )
        report.step(
            training, sums, epoch=batch.epoch, wait_s=batch.wait_s, is_last=step == pace.end
        )
        if step == first + 1:
            training.settle()
        for callback in callbacks:
            callback.on_step(step)
        if checkpoints is not None:
            checkpoints.report()
        evaluates = pace.evaluates(step) and not decision.stop
        if not (decision.stop or decision.saves or evaluates or pace.saves(step)):
            continue
        look_back(training)
        report.flush()
        metrics, ending = measured(batch.epoch) if evaluates else ({}, stopped(decision))
        if checkpoints is not None:
            checkpoints.after(
                metrics, is_due=decision.saves or ending is not None or pace.saves(step)
            )
        if ending is not None:
            return ending
    return _finished(early_stopping)


def _finished(early_stopping: EarlyStopping) -> Ending:
    return Ending(
        status="finished",
        reason=f"stopped early: {early_stopping.reason}" if early_stopping.is_over else "",
    )


def stopped(decision: Decision) -> Ending | None:
    """Returns the ending that all ranks agreed on, None if they did not."""
    stop = Stop(decision.stop)
    status: Literal["stopped", "preempted"] = "preempted" if stop.is_preemption else "stopped"
    return (
        Ending(
            status=status,
            reason=stop.words(decision.stop_rank),
            exit_code=stop.exit_code,
            stop=stop,
        )
        if stop
        else None
    )
