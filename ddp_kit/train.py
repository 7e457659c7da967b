"""`python -m ddp_kit.train RECIPE.py [--field value ...]`, and the same from Python as `run`.

Owns: the life of a run from its flags to its exit code: the order of things.
Refuses: doing any of it itself: it calls the parts in order.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddp_kit.checkpoint.best_weights import best_weights
from ddp_kit.checkpoint.checkpointer import About, Checkpointer
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.resume import binding, resume, resume_data
from ddp_kit.checkpoint.retention import keep_of
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.config.command_line import parse
from ddp_kit.config.secrets import secrets_of
from ddp_kit.config.validation import check
from ddp_kit.distributed.collectives import from_rank
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import is_first_rank, read_topology
from ddp_kit.errors import ConfigError
from ddp_kit.io.json_lines import supersede
from ddp_kit.io.logs import hiding, logger, patient_output, rank_log
from ddp_kit.io.redact import redact
from ddp_kit.lifecycle.history import job_facts, require_progress
from ddp_kit.lifecycle.outcome import Life, Outcome
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.lifecycle.session import recipe_path, run_command, session
from ddp_kit.lifecycle.start import (
    Place,
    begins_from,
    default_path,
    open_directory,
    reporter_of,
    say,
    write_facts,
)
from ddp_kit.recipe import Recipe, load_recipe
from ddp_kit.settings import Settings, to_json
from ddp_kit.setup.build import Composition, compose, require_same_settings
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.signals import (
    REQUEUE,
    Abandoned,
    StopFlag,
    Stopped,
    heeding,
    is_restarted,
    leaves_with_agent,
    signals_noted,
)
from ddp_kit.stopping.stop_watcher import process_age_s
from ddp_kit.trackers.base import RunInfo
from ddp_kit.training.evaluator import data_sets
from ddp_kit.training.loop import Ending, fit, stopped
from ddp_kit.training.reporter import Reporter


def run(recipe: Recipe, settings: Settings, *, name: str = "run") -> Outcome:
    """Trains a recipe. Every rank calls it; in a process that is no rank it trains alone.

    Raises: ConfigError, DataError, NonFiniteError or whatever the recipe's own code raises; the run
    directory then says "failed".
    """
    check(settings)
    return _live(lambda: recipe, Life(settings=settings, name=name))


def _live(build: Callable[[], Recipe], life: Life) -> Outcome:
    """Enters the group and trains. A command (it has a `source`) says itself what failed."""
    path = Path(life.settings.run_dir) if life.settings.run_dir else default_path(life.name)
    with (
        patient_output(),
        hiding(secrets_of(life.settings)),
        signals_noted() as stop,
        _warnings_requeue(stop, path),
        ExitStack() as stack,
        session(
            life.settings,
            speaks=life.source is not None,
            on_failure=life.failed,
            after_failure=life.mourned,
            run_dir=path,
        ) as group,
    ):
        life.stop = stop
        try:
            outcome = _train(build, life, group, stack)
            stack.close()
            # Srun may end the others at the first exit code: nobody leaves before rank
            # 0 is done.
            from_rank(group, b"")
            return outcome
        except BaseException:
            # Torchrun sends SIGTERM to the survivors of a rank: what failed is to be
            # written down first.
            stop.deferring = True
            raise


@contextmanager
def _warnings_requeue(stop: StopFlag, path: Path) -> Iterator[None]:
    """After a warning before the first step, rank 0 asks for another life, also where there is no
    run directory yet, or no group.
    """
    try:
        yield
    except Stopped as early:
        stop.deferring = True
        if early.code == REQUEUE and is_first_rank():
            RunDir(path).ask_requeue(str(early))
        raise


def _train(build: Callable[[], Recipe], life: Life, group: Group, stack: ExitStack) -> Outcome:
    settings, source = life.settings, life.source
    require_same_settings(group, settings, text=source.text if source else "")
    recipe = build()
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            "the function `recipe` must return a ddp_kit.Recipe; it returned "
            f"{type(recipe).__name__}."
        )

    def claimed(directory: RunDir) -> None:
        stack.callback(directory.release)
        life.directory = directory

    place = life.place = open_directory(
        settings, group, name=life.name, source=source, claimed=claimed
    )
    stack.enter_context(rank_log(place.path / "logs", rank=group.rank))
    opened = begins_from(settings, group, place)
    needs_base = opened is None or settings.save_trainable_only
    composition = life.composition = compose(
        recipe,
        settings if needs_base else replace(settings, init_from=""),
        group,
        is_resumed=opened is not None,
    )
    reporter, stopping = reporter_of(recipe, settings, group), EarlyStopping(settings.early_stop)
    changed = _take_over(opened, life, composition, reporter, stopping)
    training, pace = composition.training, composition.pace
    if (
        opened is not None
        and place.is_finished
        and not changed
        and (training.step >= pace.end or place.is_stopped_early)
    ):
        return _finished_before(life, place)
    owes = opened is not None and pace.evaluates(training.step) and not opened.manifest.metrics
    _begin(life, place, composition, reporter, is_first=opened is None, owes_evaluation=owes)
    stack.callback(life.close)
    for callback in recipe.callbacks:
        callback.on_start(training.model)

    def evaluate(epoch: int) -> dict[str, float]:
        if composition.evaluator.sets:
            life.metrics = _evaluate(composition, reporter, epoch=epoch, stop=life.stop)
        return life.metrics

    # But its test data are still to be evaluated.
    is_over = opened is not None and not changed and stopping.is_over
    with closing(
        composition.feed.batches(start=training.step, end=training.step if is_over else pace.end)
    ) as batches:
        ending = fit(
            training,
            batches,
            pace=pace,
            report=reporter,
            evaluate=evaluate,
            early_stopping=stopping,
            stop=life.stop,
            callbacks=recipe.callbacks,
            owes_evaluation=owes,
        )
    return _end(ending, life, place, composition, reporter, recipe)


def _take_over(
    opened: Opened | None,
    life: Life,
    composition: Composition,
    reporter: Reporter,
    stopping: EarlyStopping,
) -> list[str]:
    """Sets saving up, and goes on from a checkpoint if there is one. Returns the settings that were
    changed on purpose.
    """
    settings, place, training = life.settings, life.place, composition.training
    assert place is not None
    new = binding(settings, recipe=life.source.sha256 if life.source else "")
    training.checkpoints = Checkpointer(
        training,
        LocalDisk(place.checkpoints),
        about=About(
            run_id=place.run_id, binding=new, steps_per_epoch=composition.pace.steps_per_epoch
        ),
        keep=keep_of(settings, composition.evaluator.names),
        minutes=settings.save_minutes,
        early_stopping=stopping,
        course=composition.feed.course,
        on_end=life.saved,
    )
    if opened is None:
        return []
    life.metrics = {name: float(value) for name, value in opened.manifest.metrics.items()}
    resume_data(
        opened,
        composition.feed,
        world_size=training.group.world_size,
        restarts=settings.resume_data == "restart",
    )
    return resume(opened, training, settings=settings, new=new, early_stopping=stopping)


def _begin(
    life: Life,
    place: Place,
    composition: Composition,
    reporter: Reporter,
    *,
    is_first: bool,
    owes_evaluation: bool,
) -> None:
    """Writes down that this life begins, and tells everybody. Raises: DdpKitError if this job goes
    round in circles.
    """
    training = composition.training
    if life.directory is not None:
        supersede(place.path / "metrics.jsonl", step=training.step, owes_evaluation=owes_evaluation)
        write_facts(life.directory, life.settings, training.group, place=place, source=life.source)
        life.directory.status("running", step=training.step)
    say(composition, training.group, place.path)
    info = RunInfo(
        run_dir=place.path,
        name=life.name,
        settings=redact(to_json(life.settings)),
        total_steps=composition.pace.end,
    )
    life.reporter = reporter
    reporter.start(info, step=training.step)
    require_progress(place.starts, step=training.step)
    lost = "" if is_first else f"{max(0, place.last_step - training.step)} steps lost"
    if lost:
        logger.info("resumed at step %d: %s", training.step, lost)
    reporter.event(
        "start" if is_first else "resume", step=training.step, message=lost, about=job_facts()
    )
    life.watches(training)


def _evaluate(
    composition: Composition, reporter: Reporter, *, epoch: int, stop: StopFlag
) -> dict[str, float]:
    training, evaluator = composition.training, composition.evaluator
    with heeding(training.control, stop) as heed:
        metrics = evaluator(training.model, average=training.average, heed=heed)
    reporter.log({"kind": "eval", "step": training.step, "epoch": epoch, **metrics})
    if evaluator.recipe.samples is not None:
        with evaluator.weights(training):
            reporter.samples(evaluator.samples(training.model), step=training.step)
    return metrics


def _end(
    ending: Ending,
    life: Life,
    place: Place,
    composition: Composition,
    reporter: Reporter,
    recipe: Recipe,
) -> Outcome:
    """Waits for the last save, evaluates the test data and leaves the status."""
    training = composition.training
    assert training.checkpoints is not None
    if ending.stop:
        # Now, on ranks that saw no sign of it.
        life.stop.ask(ending.stop)
    # The last one holds the result.
    training.checkpoints.finish(failures=1)
    if ending.stop:
        logger.info(
            "%s: the stop took %.1f s until everything was saved",
            ending.reason,
            time.monotonic() - life.stop.since,
        )
    # Hashing belongs into no grace period.
    has_time = ending.status != "preempted"
    hashes = training.group.rank == 0 or training.strategy.shards is not None
    digest = weights_sha256(training.model) if has_time and hashes else ""
    digest = from_rank(training.group, digest.encode()).decode()
    if ending.status == "finished" and recipe.test_data is not None:
        try:
            life.metrics |= _test(recipe, life, place, composition, reporter)
        except Abandoned as abandoned:  # the next life evaluates them
            ending = stopped(abandoned.decision) or ending
    training.control.close()
    for callback in recipe.callbacks:
        callback.on_end(ending.reason or ending.status)
    return life.ended(ending, digest=digest)


def _test(
    recipe: Recipe, life: Life, place: Place, composition: Composition, reporter: Reporter
) -> dict[str, float]:
    """Evaluates the test data once, on the weights of the best checkpoint (the last ones without
    one).
    """
    assert recipe.test_data is not None
    training, evaluator = composition.training, composition.evaluator
    sets = data_sets(recipe.test_data(), what="test")
    keep = keep_of(life.settings, evaluator.names)
    with (
        best_weights(training, LocalDisk(place.checkpoints), keep=keep) as step,
        heeding(training.control, life.stop) as heed,
    ):
        metrics = evaluator.on(sets)(training.model, heed=heed)
    reporter.log({"kind": "test", "step": step or training.step, **metrics})
    return {f"test/{name}": value for name, value in metrics.items()}


def _finished_before(life: Life, place: Place) -> Outcome:
    """The run is finished and nothing was changed: says so."""
    earlier: Any = place.earlier
    logger.info("run %s is finished already (step %s): nothing to do", place.path, earlier["step"])
    ending = Ending(status="finished", reason=earlier["reason"])
    return life.outcome(ending, metrics=earlier["metrics"], digest=earlier["weights_sha256"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 finished or stopped on request, 1 error, 2 usage, 75
    saved, please requeue, 130 SIGINT, 143 SIGTERM or SIGHUP; 0 also after a stop that torchrun's
    agent would take for a failure and undo.
    """
    args, began = list(sys.argv[1:] if argv is None else argv), time.monotonic() - process_age_s()

    def command() -> int:
        path = recipe_path(args, command="python -m ddp_kit.train")
        topology = read_topology()
        leaves_with_agent(topology.launcher)
        source = load_recipe(path)
        settings = parse(
            source.settings, args[1:], prog=f"ddp_kit.train {args[0]}", rank=topology.rank
        )
        life = Life(settings=settings, name=source.name, source=source, args=args, began=began)
        outcome = _live(lambda: source.build(settings), life)
        return 0 if is_restarted() else outcome.exit_code

    with patient_output():
        return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
