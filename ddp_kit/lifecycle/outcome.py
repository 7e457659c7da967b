"""How an attempt ended, as its caller gets it and as the run directory keeps it, when all ranks
agreed on the end. What a failure leaves is `attempt`'s.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ddp_kit.checkpoint.format.commit import SaveError
from ddp_kit.errors import NonFiniteError
from ddp_kit.io.logs import logger
from ddp_kit.lifecycle.attempt import Attempt, RunContext
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.lifecycle.status import status_content
from ddp_kit.stopping.signals import REQUEUE, Stop
from ddp_kit.training.loop import Ending
from ddp_kit.training.state import SavesState


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


def outcome_of(
    context: RunContext, ending: Ending, *, metrics: Mapping[str, float], digest: str
) -> Outcome:
    """Returns an ending as `run` hands it to its caller."""
    training = context.built.training
    return Outcome(
        status=ending.status,
        reason=ending.reason,
        exit_code=ending.exit_code,
        step=training.step,
        metrics=dict(metrics),
        weights_sha256=digest,
        run_dir=context.place.path,
        model=training.model,
    )


def leave_ending(attempt: Attempt, context: RunContext, ending: Ending, *, digest: str) -> Outcome:
    """Writes status.json, tells the trackers, and a person how to go on. Every rank calls it; rank
    0 has a directory to write to.
    """
    if context.directory is not None:
        _write_ending(context.directory, attempt, context, ending, digest=digest)
    return outcome_of(context, ending, metrics=attempt.metrics, digest=digest)


def _write_ending(
    directory: RunDir, attempt: Attempt, context: RunContext, ending: Ending, *, digest: str
) -> None:
    step = context.built.training.step
    cadence = context.built.cadence
    reporter = context.reporter
    status = status_content(
        ending.status,
        reason=ending.reason,
        step=step,
        epoch=cadence.cursor.epoch(step, steps_per_epoch=cadence.steps_per_epoch),
        metrics=attempt.metrics,
        weights_sha256=digest,
        exit_code=ending.exit_code,
    )
    try:
        directory.leave_status(status)
    except OSError as error:
        # The run is over all the same, and its last checkpoint is whole.
        logger.warning("status.json could not be written: %s", error)
    if ending.exit_code == REQUEUE:
        directory.ask_requeue(ending.reason)
    if (
        attempt.stop_watcher is not None
        and ending.stop is Stop.FILE
        and attempt.stop_watcher.take("STOP")
    ):
        reporter.event("acknowledged", step=step, message="the file STOP")
    kind = "finish" if ending.status == "finished" else "stop"
    reporter.event(kind, step=step, message=ending.reason)
    reporter.finish(status)
    advice = ""
    if ending.status != "finished":
        advice = attempt.advice
    if advice:
        logger.info("%s", advice)


@contextmanager
def finishing_save(checkpoints: SavesState | None) -> Iterator[None]:
    """Finishes the save in flight before the run ends by a step that is not finite.

    All ranks are well and raise it at the same step. After any other error the peers may be gone.
    """
    try:
        yield
    except NonFiniteError:
        if checkpoints is not None:
            # It says itself what became of it, and the step is what ends the run.
            with suppress(SaveError):
                checkpoints.finish()
        raise
