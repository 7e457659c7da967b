"""Going on from a checkpoint: at the begin of an attempt, and back to the last one in its midst.

A run goes back in the same processes. What its start has built stays: the wrapped model, DDP's
buckets, the process groups. What steps have changed is read, as in a new attempt.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ddp_kit.checkpoint.checkpointer import Checkpointer
from ddp_kit.checkpoint.find import Origin, find
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.resume import resume, resume_data
from ddp_kit.data.iterable import StreamPosition
from ddp_kit.errors import DdpKitError
from ddp_kit.io.logs import logger
from ddp_kit.lifecycle.attempt import Attempt, RunContext
from ddp_kit.setup.build import Built, cadence_of


def go_on_from(
    opened: Opened, attempt: Attempt, context: RunContext, *, bound: Mapping[str, Any]
) -> list[str]:
    """Puts an attempt into the state of a checkpoint. Every rank calls it. Returns the settings
    that were changed on purpose.

    Args: `bound` are the settings that a later attempt must share.
    Raises: ConfigError for a checkpoint that does not fit.
    """
    settings = context.request.settings
    built = context.built
    attempt.metrics = _metrics_of(opened)
    resume_data(
        opened,
        built.feed,
        world_size=built.training.group.world_size,
        restarts=settings.resume_data == "restart",
    )
    changed = resume(
        opened,
        built.training,
        feed=built.feed,
        settings=settings,
        new=bound,
        early_stopping=context.early_stopping,
    )
    # The place may be another one now.
    built.cadence = cadence_of(settings, built.feed)
    return changed


def owes_evaluation(opened: Opened, context: RunContext) -> bool:
    """Whether a checkpoint was written before the evaluation of its step."""
    step = opened.manifest.step
    return step > 0 and context.built.cadence.evaluates(step) and not opened.manifest.metrics


def leave_a_way_back(opened: Opened | None, built: Built, *, changed: Sequence[str]) -> None:
    """Saves before the first step where the run could not go back to what is there. Every rank
    calls it.

    A checkpoint of other settings is no place to go back to: its numbers were replaced by those of
    this attempt once, at its begin.
    """
    checkpoints = built.training.checkpoints
    assert checkpoints is not None
    if opened is None:
        if built.feed.progress is not None:
            # In these processes the data set will have moved on.
            state = copy.deepcopy(built.feed.data.dataset.state_dict())
            built.feed.progress.note(0, StreamPosition(state=state))
        checkpoints.save({})
    elif changed:
        checkpoints.save(_metrics_of(opened), again=True)


def roll_back(attempt: Attempt, context: RunContext) -> bool:
    """Takes a run back to its last checkpoint, which then knows the steps that are left out. Every
    rank calls it, at one step.

    Returns: whether the evaluation of that step is still to come.
    Raises: DdpKitError if there is no good checkpoint.
    """
    training = context.built.training
    reporter = context.reporter
    checkpoints = training.checkpoints
    assert isinstance(checkpoints, Checkpointer)
    bad_step = training.step + 1
    reporter.flush()
    reporter.tell_dropped(training)
    # The one in flight is the newest.
    checkpoints.finish()
    opened = find(Origin(context.place.checkpoints), group=training.group, sets_aside=True)
    if opened is None:
        raise DdpKitError(
            f"step {bad_step} is bad, and no good checkpoint is there to go back to. "
            "Nothing of it was applied."
        )
    go_on_from(opened, attempt, context, bound=checkpoints.binding)
    training.agreed_step = -1
    reporter.go_back(training.step)
    message = f"back from step {bad_step} to the checkpoint of step {training.step}"
    logger.warning("%s", message)
    reporter.event("rollback", step=training.step, message=message)
    # Killed from now on, the run still knows what it leaves out.
    checkpoints.save(_metrics_of(opened), again=True)
    return owes_evaluation(opened, context)


def _metrics_of(opened: Opened) -> dict[str, float]:
    return {name: float(value) for name, value in opened.manifest.metrics.items()}
