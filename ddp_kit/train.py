"""`python -m ddp_kit.train RECIPE.py [--field value ...]`, and the same from Python as `run`.

Owns: the life of a run from its flags to its exit code, and what it leaves in the run directory.
Refuses: doing any of it itself: it calls the parts in order.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ddp_kit import batching
from ddp_kit.best import BestWeights
from ddp_kit.collectives import from_rank
from ddp_kit.compose import Composition, Evaluator, compose, data_sets, require_same_settings
from ddp_kit.early_stopping import EarlyStopping
from ddp_kit.environment import describe
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.fit import Ending, fit
from ddp_kit.flags import parse
from ddp_kit.logs import logger, rank_log
from ddp_kit.precision import arithmetic
from ddp_kit.preemption import StopFlag, signals_noted
from ddp_kit.process_group import Group, explain, process_group
from ddp_kit.recipe import Recipe, RecipeSource, load_recipe
from ddp_kit.report import Reporter
from ddp_kit.run_dir import RunDir, default_name
from ddp_kit.settings import Settings, check, to_json
from ddp_kit.topology import facts, read_topology
from ddp_kit.trackers import RunInfo, Tracker, redact
from ddp_kit.trackers.console import Console
from ddp_kit.trackers.jsonl import JsonlTracker
from ddp_kit.weights import save_weights, weights_sha256


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
    reporter: Reporter | None = None
    composition: Composition | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def run(recipe: Recipe, settings: Settings, *, name: str = "run", source: RecipeSource | None = None) -> Outcome:
    """Trains a recipe. Every rank calls it; in a process that is no rank it trains alone.

    Raises: ConfigError, DataError, NonFiniteError or whatever the recipe's own code raises; the run directory then says "failed".
    """
    check(settings)
    return _run(lambda: recipe, settings, name=name, source=source, speaks=False)


def _run(build: Any, settings: Settings, *, name: str, source: RecipeSource | None, speaks: bool) -> Outcome:
    with (
        process_group(device=settings.device, threads=settings.threads, tuning=settings.tuning) as group,
        arithmetic(settings.precision, group.device),
        signals_noted() as stop,
        ExitStack() as stack,
    ):
        life = _Life()
        try:
            return _train(build, settings, group, stop, life, stack, name=name, source=source)
        except BaseException as error:
            _fail(error, group, life, speaks=speaks)
            raise


def _train(
    build: Any, settings: Settings, group: Group, stop: StopFlag, life: _Life, stack: ExitStack, *, name: str, source: RecipeSource | None
) -> Outcome:
    require_same_settings(group, settings, text=source.text if source else "")
    recipe: Recipe = build()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"the function `recipe` must return a ddp_kit.Recipe; it returned {type(recipe).__name__}.")
    path = _open_directory(settings, group, life, stack, name=name, source=source)
    stack.enter_context(rank_log(path / "logs", rank=group.rank))
    composition = life.composition = compose(recipe, settings, group)
    reporter = life.reporter = _reporter(recipe, settings, group)
    training, pace = composition.training, composition.pace
    _say(composition, group, path)
    info = RunInfo(run_dir=path, name=name, settings=redact(to_json(settings)), total_steps=pace.end)
    reporter.start(info, step=training.step)
    reporter.event("start", step=training.step)
    for callback in recipe.callbacks:
        callback.on_start(training.model)
    needs_best = recipe.test_data is not None or bool(settings.early_stop.metric)
    best = BestWeights.of(training.model, settings.early_stop, composition.evaluator.names if needs_best else {})

    def evaluate(epoch: int) -> dict[str, float]:
        if composition.evaluator.sets:
            metrics = _evaluate(composition, reporter, best, epoch=epoch)
            life.metrics = metrics
        return life.metrics

    batches = composition.feed.batches(start=training.step, end=pace.end)
    stopping = EarlyStopping(settings.early_stop)
    ending = fit(
        training, batches, pace=pace, report=reporter, evaluate=evaluate, early_stopping=stopping, stop=stop, callbacks=recipe.callbacks
    )
    training.control.close()
    if ending.status == "finished" and recipe.test_data is not None:
        life.metrics |= _test(composition.evaluator, recipe, reporter, best, composition)
    for callback in recipe.callbacks:
        callback.on_end(ending.reason or ending.status)
    return _finish(ending, composition, reporter, best, life, path)


def _open_directory(settings: Settings, group: Group, life: _Life, stack: ExitStack, *, name: str, source: RecipeSource | None) -> Path:
    """Rank 0 chooses and claims the run directory and writes the facts of the run; all ranks learn the path."""
    path = Path(settings.run_dir) if settings.run_dir else default_name(name)
    if group.rank == 0:
        directory = RunDir(path)
        directory.claim()
        stack.callback(directory.release)
        life.directory = directory
        about = {"recipe": str(source.path), "recipe_sha256": source.sha256} if source else {"recipe": name}
        directory.write_json("settings.json", about | {"settings": redact(to_json(settings))})
        folder = source.path.parent if source else None
        directory.write_json("env.json", describe(group.topology, group.device, recipe_folder=folder))
        directory.status("running")
    return Path(from_rank(group, str(path).encode()).decode())


def _reporter(recipe: Recipe, settings: Settings, group: Group) -> Reporter:
    if group.rank:
        return Reporter([], log_every=settings.log_every)
    console = Console()
    trackers: list[Tracker] = [JsonlTracker(), console]
    if "wandb" in settings.tracker:
        from ddp_kit.trackers.wandb import WandbTracker

        trackers.append(WandbTracker(settings.wandb))
    if "tensorboard" in settings.tracker:
        from ddp_kit.trackers.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker())
    return Reporter([*trackers, *recipe.trackers], log_every=settings.log_every, progress=[console.progress])


def _say(composition: Composition, group: Group, path: Path) -> None:
    """The lines at start: where, the split, the defaults for speed, and what wrapping found."""
    training = composition.training
    logger.debug("%s", facts(group.topology))
    tuned = [*group.tuned, *(["channels_last"] if composition.evaluator.placement.channels_last else [])]
    logger.info("run %s on %s x %s, %d steps", path, group.world_size, group.device.type, composition.pace.end)
    logger.info("batch: %s", batching.describe(training.plan))
    logger.info("for speed (--no-tuning switches it off): %s", ", ".join(tuned))
    for note in training.notes:
        logger.info("note: %s", note)


def _evaluate(composition: Composition, reporter: Reporter, best: BestWeights, *, epoch: int) -> dict[str, float]:
    training, evaluator = composition.training, composition.evaluator
    metrics = evaluator(training.model, average=training.average)
    reporter.log({"kind": "eval", "step": training.step, "epoch": epoch, **metrics})
    with evaluator.weights(training):
        best.offer(metrics, step=training.step)
        if evaluator.recipe.samples is not None:
            reporter.samples(evaluator.samples(training.model), step=training.step)
    return metrics


def _test(evaluator: Evaluator, recipe: Recipe, reporter: Reporter, best: BestWeights, composition: Composition) -> dict[str, float]:
    """Evaluates the test data once, on the best weights (the last ones without an evaluation)."""
    assert recipe.test_data is not None
    training = composition.training
    sets = data_sets(recipe.test_data(), what="test")
    with best.applied():
        metrics = evaluator.on(sets)(training.model, average=None if best.step else training.average)
    reporter.log({"kind": "test", "step": best.step or training.step, **metrics})
    return {f"test/{name}": value for name, value in metrics.items()}


def _finish(ending: Ending, composition: Composition, reporter: Reporter, best: BestWeights, life: _Life, path: Path) -> Outcome:
    training = composition.training
    digest = weights_sha256(training.model) if training.group.rank == 0 else ""
    digest = from_rank(training.group, digest.encode()).decode()
    steps = composition.pace.steps_per_epoch
    if life.directory is not None:
        with best.applied():
            save_weights(training.model, path / "model.safetensors")
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


def _fail(error: BaseException, group: Group, life: _Life, *, speaks: bool) -> None:
    """Says what failed (the culprit first, once), and leaves it in the run directory."""
    text = explain(group, error)
    logger.debug("%s", text)
    if speaks and text:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
    if life.directory is None:
        return
    culprit = group.culprit() or (group.rank, f"{type(error).__name__}: {error}")
    step = life.composition.training.step if life.composition else 0
    code = error.exit_code if isinstance(error, DdpKitError) else 1
    reason = f"rank {culprit[0]}: {culprit[1]}"
    status = life.directory.status("failed", reason=reason, step=step, metrics=life.metrics, exit_code=code)
    if life.reporter is not None:
        life.reporter.event("failure", step=step, rank=culprit[0], message=reason)
        life.reporter.finish(status)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 finished, 1 error, 2 usage, 130 SIGINT, 143 SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)
    rank = 0
    try:
        rank = read_topology().rank
        source = load_recipe(recipe_path(args, command="train"))
        settings = parse(source.settings, args[1:], prog=f"ddp_kit.train {args[0]}", rank=rank)
    except DdpKitError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    try:
        return _run(lambda: source.build(settings), settings, name=source.name, source=source, speaks=True).exit_code
    except DdpKitError as error:
        return error.exit_code
    except Exception:  # `_fail` has said it
        return 1


def recipe_path(args: Sequence[str], *, command: str) -> str:
    """Returns the recipe of a command line. Raises: ConfigError with the usage if there is none; SystemExit after `--help`."""
    if args and not args[0].startswith("-"):
        return args[0]
    usage = f"usage: python -m ddp_kit.{command} RECIPE.py [--field value ...]\n       python -m ddp_kit.{command} RECIPE.py --help lists the recipe's flags"
    if args and args[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0)
    raise ConfigError(f"the recipe comes first.\n{usage}")


if __name__ == "__main__":
    sys.exit(main())
