"""The beginning of an attempt, once its parts are made: what is written down, and what is said."""

import logging
from pathlib import Path

from ddp_kit.data import batch_plan
from ddp_kit.distributed.launcher_pipes import tell_run_folder
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import facts
from ddp_kit.io.json_lines import supersede
from ddp_kit.io.logs import logger
from ddp_kit.io.redact import redact
from ddp_kit.lifecycle.attempt import Attempt, RunContext
from ddp_kit.lifecycle.history import require_progress
from ddp_kit.lifecycle.start import write_facts
from ddp_kit.settings import to_json
from ddp_kit.setup.build import Built
from ddp_kit.trackers.base import RunInfo


def begin(attempt: Attempt, context: RunContext, *, is_first: bool, owes_evaluation: bool) -> None:
    """Writes down that this attempt begins, tells everybody, and begins to look for a stop.

    Raises: DdpKitError if this job goes round in circles.
    """
    request = context.request
    place = context.place
    training = context.built.training
    if context.directory is not None:
        supersede(place.path / "metrics.jsonl", step=training.step, owes_evaluation=owes_evaluation)
        write_facts(
            context.directory, request.settings, training.group, place=place, source=request.source
        )
        context.directory.status("running", step=training.step)
        tell_run_folder(place.path)
        context.directory.tell_progress(lambda: _progress(context))
    say(context.built, training.group, place.path)
    info = RunInfo(
        run_dir=place.path,
        name=request.name,
        settings=redact(to_json(request.settings)),
        total_steps=context.built.cadence.end,
    )
    attempt.has_begun = True
    context.reporter.start(info, step=training.step)
    attempt.life.began = training.step
    require_progress(place.starts, step=training.step, endings=place.endings)
    kind = "start"
    lost = ""
    if not is_first:
        kind = "resume"
        lost = f"{max(0, place.last_step - training.step)} steps lost"
        logger.info("resumed at step %d: %s", training.step, lost)
    context.reporter.event(kind, step=training.step, message=lost, about=place.job)
    attempt.watch_for_stops(context)


def _progress(context: RunContext) -> tuple[int, int]:
    """Returns the step and epoch that a run is at."""
    cadence = context.built.cadence
    step = context.built.training.step
    return step, cadence.cursor.epoch(step, steps_per_epoch=cadence.steps_per_epoch)


def say(built: Built, group: Group, path: Path) -> None:
    """The lines at start: where, the split, the defaults for speed, and what wrapping found."""
    training = built.training
    topology = group.topology
    # One process has nothing to say of its launcher.
    level = logging.DEBUG if topology.launcher == "none" else logging.INFO
    logger.log(level, "ranks by %s: %s", topology.launcher, facts(topology))
    tuned = [*group.tuned, *training.tuned]
    if built.evaluator.placement.channels_last:
        tuned.append("channels_last")
    end = built.cadence.end
    logger.info("run %s on %s x %s, %d steps", path, group.world_size, group.device.type, end)
    logger.info("batch: %s", batch_plan.describe(training.plan))
    logger.info("for speed (--no-tuning switches it off): %s", ", ".join(tuned))
    for note in training.notes:
        logger.info("note: %s", note)
