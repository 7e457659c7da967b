"""`python -m ddp_kit.train RECIPE.py [--field value ...]`, and the same from Python as `run`.

Owns: the life of a run from its flags to its exit code, and what it leaves in the run directory.
Refuses: doing any of it itself: it calls the parts in order.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ddp_kit.begin import Place, begins_from, open_directory, reporter_of, resume_command, say
from ddp_kit.best import keep_of
from ddp_kit.blame import Verdict
from ddp_kit.checkpoint.retention import Keep
from ddp_kit.checkpoint.storage import LocalDisk
from ddp_kit.collectives import from_rank
from ddp_kit.compose import Composition, Evaluator, compose, data_sets, require_same_settings
from ddp_kit.early_stopping import EarlyStopping
from ddp_kit.errors import ConfigError
from ddp_kit.fit import Ending, fit, stopped
from ddp_kit.flags import parse
from ddp_kit.groups import Group
from ddp_kit.logs import logger, rank_log
from ddp_kit.preemption import StopFlag, Stopped, signals_noted
from ddp_kit.recipe import Recipe, RecipeSource, load_recipe
from ddp_kit.report import Reporter
from ddp_kit.resume import binding, resume
from ddp_kit.run_dir import RunDir
from ddp_kit.saving import About, Checkpoints, best_weights
from ddp_kit.session import exit_code, recipe_path, run_command, session
from ddp_kit.settings import Settings, check, to_json
from ddp_kit.topology import read_topology
from ddp_kit.trackers import RunInfo, redact
from ddp_kit.trackers.jsonl import supersede
from ddp_kit.training import Training
from ddp_kit.weights import weights_sha256


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, the same on every rank; `model` holds the last weights."""

    status: str
    reason: str
    exit_code: int
    step: int
    metrics: Mapping[str, float]
    weights_sha256: str
    run_dir: Path
    model: nn.Module


@dataclass(kw_only=True)
class _Life:
    """What a failure must know about a run, filled in as it goes."""

    directory: RunDir | None = None  # rank 0 only
    path: Path | None = None
    reporter: Reporter | None = None
    composition: Composition | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    args: Sequence[str] = ()  # of the command; none from Python

    @property
    def advice(self) -> str:
        """What to type to go on with the run; "" if there is nothing to go on from."""
        if self.composition is None or self.path is None or not self.args:
            return ""
        training = self.composition.training
        saved = training.checkpoints.saved_step if training.checkpoints is not None else -1
        return f"to go on from step {saved}: {resume_command(self.args, self.path, training.group.topology)}" if saved > 0 else ""

    def failed(self, verdict: Verdict) -> None:
        """Leaves a failure in the run directory. If rank 0 is the one that died, the first of its peers does."""
        if self.directory is not None:
            self._write(self.directory, verdict)
        elif verdict.is_silent and self.path is not None:
            directory = RunDir(self.path)
            with directory.inherited() as is_heir:
                if is_heir:
                    self._write(directory, verdict)

    def _write(self, directory: RunDir, verdict: Verdict) -> None:
        error, reason = verdict.error, verdict.reason
        status = stopped(error.number, verdict.rank).status if isinstance(error, Stopped) and verdict.is_own else "failed"
        step = self.composition.training.step if self.composition else 0
        content = directory.status(status, reason=reason, step=step, metrics=self.metrics, exit_code=exit_code(error))
        if self.reporter is not None:
            self.reporter.event("failure" if status == "failed" else "stop", step=step, rank=verdict.culprit, message=reason)
            self.reporter.finish(content)
        if self.advice:
            sys.stderr.write(f"{self.advice}\n")


def run(recipe: Recipe, settings: Settings, *, name: str = "run") -> Outcome:
    """Trains a recipe. Every rank calls it; in a process that is no rank it trains alone.

    Raises: ConfigError, DataError, NonFiniteError or whatever the recipe's own code raises; the run directory then says "failed".
    """
    check(settings)
    return _live(lambda: recipe, settings, name=name)


def _live(
    build: Callable[[], Recipe], settings: Settings, *, name: str, source: RecipeSource | None = None, args: Sequence[str] = ()
) -> Outcome:
    """Enters the group and trains. A command (it has a `source`) says itself what failed."""
    life = _Life(args=args)
    with (
        signals_noted() as stop,
        ExitStack() as stack,
        session(settings, speaks=source is not None, on_failure=life.failed) as group,
    ):
        try:
            return _train(build, settings, group, stop, life, stack, name=name, source=source)
        except BaseException:
            stop.deferring = True  # torchrun sends SIGTERM to the survivors of a rank: what failed is to be written down first
            raise


def _train(
    build: Callable[[], Recipe],
    settings: Settings,
    group: Group,
    stop: StopFlag,
    life: _Life,
    stack: ExitStack,
    *,
    name: str,
    source: RecipeSource | None,
) -> Outcome:
    require_same_settings(group, settings, text=source.text if source else "")
    recipe = build()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"the function `recipe` must return a ddp_kit.Recipe; it returned {type(recipe).__name__}.")

    def claimed(directory: RunDir) -> None:
        stack.callback(directory.release)
        life.directory = directory

    place = open_directory(settings, group, name=name, source=source, claimed=claimed)
    path = life.path = place.path
    stack.enter_context(rank_log(path / "logs", rank=group.rank))
    opened = begins_from(settings, group, place)
    needs_base = opened is None or settings.save_trainable_only
    composition = life.composition = compose(recipe, settings if needs_base else replace(settings, init_from=""), group)
    reporter = life.reporter = reporter_of(recipe, settings, group)
    training, pace, stopping = composition.training, composition.pace, EarlyStopping(settings.early_stop)
    new = binding(settings, recipe=source.sha256 if source else "")
    keep = keep_of(settings, composition.evaluator.names)
    training.checkpoints = Checkpoints(
        training,
        LocalDisk(path / "checkpoints"),
        about=About(run_id=place.run_id, binding=new, steps_per_epoch=pace.steps_per_epoch),
        keep=keep,
        minutes=settings.save_minutes,
        early_stopping=stopping,
        on_end=reporter.saved,
    )
    owes = False
    if opened is not None:
        changed = resume(opened, training, settings=settings, new=new, early_stopping=stopping)
        if place.is_finished and not changed and (training.step >= pace.end or place.is_stopped_early):
            return _finished_before(place, training)
        owes = pace.evaluates(training.step) and not opened.manifest.metrics
    if group.rank == 0:
        supersede(path / "metrics.jsonl", step=training.step, owes_evaluation=owes)
    if life.directory is not None:
        life.directory.status("running", step=training.step)
    say(composition, group, path)
    info = RunInfo(run_dir=path, name=name, settings=redact(to_json(settings)), total_steps=pace.end)
    reporter.start(info, step=training.step)
    reporter.event("resume" if opened is not None else "start", step=training.step)
    for callback in recipe.callbacks:
        callback.on_start(training.model)

    def evaluate(epoch: int) -> dict[str, float]:
        if composition.evaluator.sets:
            life.metrics = _evaluate(composition, reporter, epoch=epoch)
        return life.metrics

    with closing(composition.feed.batches(start=training.step, end=pace.end)) as batches:
        ending = fit(
            training,
            batches,
            pace=pace,
            report=reporter,
            evaluate=evaluate,
            early_stopping=stopping,
            stop=stop,
            callbacks=recipe.callbacks,
            owes_evaluation=owes,
        )
    training.control.close()
    training.checkpoints.finish()
    digest = weights_sha256(training.model) if group.rank == 0 else ""
    digest = from_rank(group, digest.encode()).decode()
    if ending.status == "finished" and recipe.test_data is not None:
        life.metrics |= _test(composition.evaluator, recipe, reporter, composition, LocalDisk(path / "checkpoints"), keep)
    for callback in recipe.callbacks:
        callback.on_end(ending.reason or ending.status)
    return _finish(ending, composition, reporter, life, path, digest=digest)


def _finished_before(place: Place, training: Training) -> Outcome:
    """The run is finished and nothing was changed: says so."""
    earlier: Any = place.earlier
    logger.info("run %s is finished already (step %s): nothing to do", place.path, earlier["step"])
    return Outcome(
        status="finished",
        reason=earlier["reason"],
        exit_code=0,
        step=training.step,
        metrics=earlier["metrics"],
        weights_sha256=earlier["weights_sha256"],
        run_dir=place.path,
        model=training.model,
    )


def _evaluate(composition: Composition, reporter: Reporter, *, epoch: int) -> dict[str, float]:
    training, evaluator = composition.training, composition.evaluator
    metrics = evaluator(training.model, average=training.average)
    reporter.log({"kind": "eval", "step": training.step, "epoch": epoch, **metrics})
    if evaluator.recipe.samples is not None:
        with evaluator.weights(training):
            reporter.samples(evaluator.samples(training.model), step=training.step)
    return metrics


def _test(
    evaluator: Evaluator, recipe: Recipe, reporter: Reporter, composition: Composition, storage: LocalDisk, keep: Keep
) -> dict[str, float]:
    """Evaluates the test data once, on the weights of the best checkpoint (the last ones without one)."""
    assert recipe.test_data is not None
    training = composition.training
    sets = data_sets(recipe.test_data(), what="test")
    with best_weights(training, storage, keep=keep) as step:
        metrics = evaluator.on(sets)(training.model)
    reporter.log({"kind": "test", "step": step or training.step, **metrics})
    return {f"test/{name}": value for name, value in metrics.items()}


def _finish(ending: Ending, composition: Composition, reporter: Reporter, life: _Life, path: Path, *, digest: str) -> Outcome:
    training = composition.training
    steps = composition.pace.steps_per_epoch
    if life.directory is not None:
        status = life.directory.status(
            ending.status,
            reason=ending.reason,
            step=training.step,
            epoch=training.step // steps if steps else 0,
            metrics=life.metrics,
            weights_sha256=digest,
            exit_code=ending.exit_code,
        )
        reporter.event("finish" if ending.status == "finished" else "stop", step=training.step, message=ending.reason)
        reporter.finish(status)
        if ending.status != "finished" and life.advice:
            logger.info("%s", life.advice)
    return Outcome(
        status=ending.status,
        reason=ending.reason,
        exit_code=ending.exit_code,
        step=training.step,
        metrics=dict(life.metrics),
        weights_sha256=digest,
        run_dir=path,
        model=training.model,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 finished, 1 error, 2 usage, 130 SIGINT, 143 SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        source = load_recipe(recipe_path(args, command="python -m ddp_kit.train"))
        settings = parse(source.settings, args[1:], prog=f"ddp_kit.train {args[0]}", rank=read_topology().rank)
        return _live(lambda: source.build(settings), settings, name=source.name, source=source, args=args).exit_code

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
