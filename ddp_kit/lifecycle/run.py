"""An attempt from the entered group to its outcome: the order of things. Each part does its own
work; here they are called one after the other.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from ddp_kit.checkpoint.best_weights import best_weights
from ddp_kit.checkpoint.checkpointer import About, Checkpointer
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.resume import binding, described
from ddp_kit.checkpoint.retention import keep_of
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.distributed.collectives import await_all, from_rank
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import logger, rank_log
from ddp_kit.lifecycle.attempt import Attempt, RunContext
from ddp_kit.lifecycle.begin import begin
from ddp_kit.lifecycle.go_on import go_on_from, leave_a_way_back, owes_evaluation, roll_back
from ddp_kit.lifecycle.outcome import Outcome, finishing_save, leave_ending, outcome_of
from ddp_kit.lifecycle.reporters import reporter_of
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.lifecycle.start import RunPlace, begins_from, open_directory
from ddp_kit.recipe import Recipe
from ddp_kit.setup.build import build, require_same_settings
from ddp_kit.setup.memory_format import naming_the_format
from ddp_kit.setup.same_machines import require_same_machines
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.signals import Abandoned, heeding
from ddp_kit.training.bad_steps import RollBack
from ddp_kit.training.loop import Ending, fit, stopped

ON_END_S = 540.0  # for callbacks' `on_end`: less than other ranks wait for rank 0


def train_attempt(
    build: Callable[[], Recipe], attempt: Attempt, group: Group, stack: ExitStack
) -> Outcome:
    """Trains a recipe in the group. Every rank calls it.

    Args: `stack` gets what must be given back however this ends; it is closed in the reverse order:
        the stop watcher ends, the rank's log is closed, the lock on the run directory is released.
    Raises: ConfigError, DataError, NonFiniteError or whatever the recipe's own code raises.
    """
    settings = attempt.request.settings
    source = attempt.request.source
    require_same_settings(group, settings, text=source.text if source else "")
    differences = require_same_machines(group, exact=settings.exact)
    recipe = build()
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            "the function `recipe` must return a ddp_kit.Recipe; it returned "
            f"{type(recipe).__name__}."
        )
    place = _open_directory(attempt, group, stack)
    opened = begins_from(settings, group, place)
    context = _build(recipe, attempt, group, place, opened)
    attempt.context = context
    changed = _take_over(opened, attempt, context)
    if opened is not None and not changed and _was_finished(context):
        return _finished_before(context)
    training = context.built.training
    training.notes += differences
    owes = opened is not None and owes_evaluation(opened, context)
    begin(attempt, context, is_first=opened is None, owes_evaluation=owes)
    stack.callback(attempt.close)
    for callback in recipe.callbacks:
        callback.on_start(training.model)
    # An early stop is final, but the test data are still to be evaluated.
    is_over = opened is not None and not changed and context.early_stopping.is_over
    end = context.built.cadence.end
    if is_over:
        end = training.step
    if training.bad_steps.rolls_back:
        leave_a_way_back(opened, context.built, changed=changed)
    ending = _fit(attempt, context, end=end, owes_evaluation=owes)
    context.stop.is_settled = True
    return _end(ending, attempt, context)


def _open_directory(attempt: Attempt, group: Group, stack: ExitStack) -> RunPlace:
    """Opens the run directory on all ranks, and this rank's log in it."""

    def claimed(directory: RunDir) -> None:
        stack.callback(directory.release)
        attempt.directory = directory

    request = attempt.request
    place = open_directory(
        request.settings, group, name=request.name, source=request.source, claimed=claimed
    )
    attempt.place = place
    attempt.life.place = place
    attempt.heed_verdicts(group)
    stack.enter_context(rank_log(place.path / "logs", rank=group.rank))
    return place


def _build(
    recipe: Recipe, attempt: Attempt, group: Group, place: RunPlace, opened: Opened | None
) -> RunContext:
    """Makes the parts of the attempt. A checkpoint's weights will replace those of --init-from,
    unless it leaves the frozen ones out.
    """
    settings = attempt.request.settings
    own = settings
    if opened is not None and not settings.save_trainable_only:
        own = replace(settings, init_from="")
    built = build(recipe, own, group, is_resumed=opened is not None)
    return RunContext(
        request=attempt.request,
        stop=attempt.stop,
        directory=attempt.directory,
        place=place,
        recipe=recipe,
        built=built,
        reporter=reporter_of(recipe, settings, group),
        early_stopping=EarlyStopping(settings.early_stop),
    )


def _take_over(opened: Opened | None, attempt: Attempt, context: RunContext) -> list[str]:
    """Sets saving up, and goes on from a checkpoint if there is one. Returns the settings that were
    changed on purpose.
    """
    settings = context.request.settings
    source = context.request.source
    built = context.built
    training = built.training
    bound = binding(settings, recipe=source.sha256 if source else "", data=described(built.feed))
    training.checkpoints = Checkpointer(
        training,
        LocalDisk(context.place.checkpoints),
        about=About(
            run_id=context.place.run_id,
            binding=bound,
            steps_per_epoch=built.cadence.steps_per_epoch,
            length=built.feed.length,
        ),
        keep=keep_of(settings, built.evaluator.names),
        minutes=settings.save_minutes,
        early_stopping=context.early_stopping,
        progress=built.feed.progress,
        on_end=attempt.saved,
    )
    if opened is None:
        return []
    return go_on_from(opened, attempt, context, bound=bound)


def _was_finished(context: RunContext) -> bool:
    """Whether an earlier attempt came to the end that this one has."""
    place = context.place
    is_at_end = context.built.training.step >= context.built.cadence.end
    return place.is_finished and (is_at_end or place.is_stopped_early)


def _finished_before(context: RunContext) -> Outcome:
    """The run is finished and nothing was changed: says so."""
    earlier: Any = context.place.earlier
    logger.info(
        "run %s is finished already (step %s): nothing to do", context.place.path, earlier["step"]
    )
    ending = Ending(status="finished", reason=earlier["reason"])
    return outcome_of(context, ending, metrics=earlier["metrics"], digest=earlier["weights_sha256"])


def _fit(attempt: Attempt, context: RunContext, *, end: int, owes_evaluation: bool) -> Ending:
    """Trains up to step `end`, from the last checkpoint again each time a bad step asks for it.
    Returns how the loop ended."""
    owes = owes_evaluation
    while True:
        try:
            return _fit_once(attempt, context, end=end, owes_evaluation=owes)
        except RollBack:
            # The batches are closed by now, and their workers gone.
            owes = roll_back(attempt, context)


def _fit_once(attempt: Attempt, context: RunContext, *, end: int, owes_evaluation: bool) -> Ending:
    built = context.built
    training = built.training

    def evaluate(epoch: int) -> dict[str, float]:
        if built.evaluator.sets:
            attempt.metrics = _evaluate(context, epoch=epoch)
        return attempt.metrics

    batches = built.feed.batches(start=training.step, end=end)
    with (
        naming_the_format(built.feed.placement),
        finishing_save(training.checkpoints),
        closing(batches),
    ):
        return fit(
            training,
            batches,
            cadence=built.cadence,
            report=context.reporter,
            evaluate=evaluate,
            early_stopping=context.early_stopping,
            stop=context.stop,
            callbacks=context.recipe.callbacks,
            owes_evaluation=owes_evaluation,
        )


def _evaluate(context: RunContext, *, epoch: int) -> dict[str, float]:
    """Evaluates and records. Raises: Abandoned if a stop leaves no time for the rest of it."""
    training = context.built.training
    evaluator = context.built.evaluator
    reporter = context.reporter
    with heeding(training.control_packet, context.stop) as heed:
        metrics = evaluator(training.model, average=training.average, heed=heed)
    reporter.log({"kind": "eval", "step": training.step, "epoch": epoch, **metrics})
    if evaluator.recipe.samples is not None:
        with evaluator.weights(training):
            reporter.samples(evaluator.samples(training.model), step=training.step)
    return metrics


def _end(ending: Ending, attempt: Attempt, context: RunContext) -> Outcome:
    """Waits for the last save, evaluates the test data and leaves the status."""
    training = context.built.training
    assert training.checkpoints is not None
    training.group.pulse.finish(training.step)
    if ending.stop:
        # Now, on ranks that saw no sign of it.
        context.stop.ask(ending.stop)
    # The last one holds the result: one failure is too many.
    training.checkpoints.finish(failures=1)
    if ending.stop:
        logger.info(
            "%s: the stop took %.1f s until everything was saved",
            ending.reason,
            time.monotonic() - context.stop.since,
        )
    attempt.life.require_new_step(ending, step=attempt.step)
    digest = ""
    # Hashing belongs into no grace period.
    has_time = ending.status != "preempted"
    if has_time and (training.group.rank == 0 or training.strategy.shards is not None):
        digest = weights_sha256(training.model)
    digest = from_rank(training.group, digest.encode()).decode()
    if ending.status == "finished" and context.built.test_sets:
        try:
            attempt.metrics |= _test(context)
        except Abandoned as abandoned:
            # The next attempt evaluates them.
            ending = stopped(abandoned.decision) or ending
    training.control_packet.close()
    for callback in context.recipe.callbacks:
        callback.on_end(ending.reason or ending.status)
    if ending.status == "finished":  # a stop has no time to wait
        await_all(training.group, "on_end", within_s=ON_END_S)
    return leave_ending(attempt, context, ending, digest=digest)


def _test(context: RunContext) -> dict[str, float]:
    """Evaluates the test data once, on the weights of the best checkpoint (the last ones without
    one). Raises: Abandoned.
    """
    training = context.built.training
    evaluator = context.built.evaluator
    on_test = evaluator.on(context.built.test_sets)
    keep = keep_of(context.request.settings, evaluator.names)
    storage = LocalDisk(context.place.checkpoints)
    with (
        naming_the_format(evaluator.placement),
        best_weights(training, storage, keep=keep) as step,
        heeding(training.control_packet, context.stop) as heed,
    ):
        metrics = on_test(training.model, heed=heed)
    context.reporter.log({"kind": "test", "step": step or training.step, **metrics})
    return {f"test/{name}": value for name, value in metrics.items()}
