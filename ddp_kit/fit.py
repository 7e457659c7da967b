"""The loop.

Owns: the order of things at a step boundary: step, packet, record, evaluation, decision.
Refuses: everything else. It fits on one screen.
"""

import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ddp_kit.data.loader import RankBatch
from ddp_kit.early_stopping import EarlyStopping
from ddp_kit.finite import look_back
from ddp_kit.preemption import StopFlag, exit_code
from ddp_kit.recipe import Callback
from ddp_kit.report import Reporter
from ddp_kit.step import train_step
from ddp_kit.training import Training


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When things happen, in optimizer steps. `steps_per_epoch` is 0 where an iterable data set does not know its length."""

    end: int
    steps_per_epoch: int
    eval_every: int = 0

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps: every `eval_every`, at every epoch's end and at the end."""
        at_epoch = bool(self.steps_per_epoch) and step % self.steps_per_epoch == 0
        return step == self.end or at_epoch or (bool(self.eval_every) and step % self.eval_every == 0)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the loop ended."""

    status: Literal["finished", "stopped", "preempted"]
    reason: str
    exit_code: int = 0


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
) -> Ending:
    """Trains on `batches` to the end of `pace`, an early stop or a signal. Every rank calls it; all leave at the same step.

    `evaluate(epoch)` returns the metrics of an evaluation after the current step, the same on all ranks ({} without eval data).
    """
    stop.deferring = True
    first = training.step
    for batch in batches:
        sums = train_step(training, batch)
        step = training.step
        decision = training.control.boundary(step, signal=stop.signal)
        report.step(training, sums, epoch=batch.epoch, wait_s=batch.wait_s, is_last=step == pace.end)
        if step == first + 1:
            training.group.settle()
        for callback in callbacks:
            callback.on_step(step)
        if not decision.signal and not pace.evaluates(step):
            continue
        look_back(training)
        report.flush()
        if decision.signal:
            return stopped(decision.signal, decision.signal_rank)
        metrics = evaluate(batch.epoch)
        if metrics:
            for callback in callbacks:
                callback.on_evaluation(step, metrics)
            if early_stopping.update(metrics, step=step):
                return Ending(status="finished", reason=f"stopped early: {early_stopping.reason}")
        report.restart_clock(step)
    return Ending(status="finished", reason="")


def stopped(number: int, rank: int) -> Ending:
    """Returns the ending that all ranks agreed on after a signal on one of them."""
    name = signal.Signals(number).name
    status: Literal["stopped", "preempted"] = "stopped" if number == signal.SIGINT else "preempted"
    return Ending(status=status, reason=f"{name} on rank {rank}", exit_code=exit_code(number))
