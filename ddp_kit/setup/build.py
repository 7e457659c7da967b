"""From a recipe and its settings to the parts of a run on this rank.

Here stands the order in which a recipe's factories are called, and which settings reach which part.
Nothing is run but what the start needs: the dry run, and one micro-batch of the evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ddp_kit.checkpoint.find import is_checkpoint
from ddp_kit.checkpoint.retention import best_notes
from ddp_kit.checkpoint.weights import base_sha256, require_equal
from ddp_kit.config.secrets import is_secret_setting
from ddp_kit.data.dataset import Data
from ddp_kit.data.loader import Feed
from ddp_kit.data.seeding import made_under_seed
from ddp_kit.distributed.collectives import first_difference, gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import REDACTED
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings, digest, flag, flatten
from ddp_kit.setup.frozen_words import frozen_in
from ddp_kit.setup.memory_format import (
    chosen_placement,
    naming_the_format,
    placement_for_optimizers,
)
from ddp_kit.setup.meta_init import Reads, materialise
from ddp_kit.setup.model import build_model, load_first_weights
from ddp_kit.setup.parts import Part, part_of
from ddp_kit.setup.start_notes import data_notes, split_notes
from ddp_kit.setup.train_data import made_train_data, train_feed
from ddp_kit.setup.watch import watch_steps
from ddp_kit.setup.wrap import wrap_parts
from ddp_kit.strategies import choose_strategy
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.checks import require_splittable, require_steppable
from ddp_kit.training.ema import WeightAverage
from ddp_kit.training.evaluation_sets import evaluation_sets, made_sets
from ddp_kit.training.loop import Cadence
from ddp_kit.training.recipe_evaluation import Evaluator
from ddp_kit.training.state import Training


def require_same_settings(group: Group, settings: Settings, *, text: str) -> None:
    """Compares the settings and the recipe's text over ranks. Every rank calls it.

    Raises: ConfigError on every rank if the ranks were started with different ones.
    """
    fields = flatten(settings) | {"recipe's text": text}
    names = list(fields)
    digests = [digest("\n".join(names))]
    digests += [digest(fields[name]) for name in names]
    at = first_difference(group, digests)
    if at is None:
        return
    if at == 0:
        raise ConfigError(
            "the ranks run different recipes: their Settings have different fields. "
            "Start all of them with one command."
        )
    name = names[at - 1]
    if name == "recipe's text":
        raise ConfigError(
            "the ranks read different texts of the recipe. All nodes must see the same files."
        )
    values = [value.decode() for value in gather_bytes(group, fields[name].encode())]
    raise ConfigError(
        f"the ranks were started with different settings: {flag(name)} is "
        f"{_by_rank(name, values)}. Start all of them with one command."
    )


def _by_rank(name: str, values: list[str]) -> str:
    """Returns the different values of a setting, each with the first rank that has it."""
    is_hidden = any(is_secret_setting(name, value) for value in values)
    shown = []
    for value in dict.fromkeys(values):
        said = REDACTED if is_hidden else value
        shown.append(f"{said} on rank {values.index(value)}")
    return ", ".join(shown)


@dataclass(kw_only=True)
class Built:
    """The parts of a run on this rank."""

    training: Training
    feed: Feed
    evaluator: Evaluator
    test_sets: Mapping[str, Data]
    cadence: Cadence


def build(recipe: Recipe, settings: Settings, group: Group, *, is_resumed: bool = False) -> Built:
    """Calls the recipe's factories and wraps what they give. Every rank calls it.

    Args: `is_resumed`: a checkpoint's state will follow.
    Raises: ConfigError, DataError or DdpKitError for what cannot be trained as given.
    """
    model = build_model(recipe, settings, group)
    data = made_train_data(recipe, settings, group)
    sets = evaluation_sets(recipe, settings, group)
    placement = chosen_placement(model, recipe, data, sets, settings, group)
    with naming_the_format(placement):
        feed = train_feed(model, recipe, data, settings, group, placement=placement)
        _require_trained(model)
        return _built(model, recipe, feed, sets, settings, group, is_resumed=is_resumed)


def _built(
    model: nn.Module,
    recipe: Recipe,
    feed: Feed,
    sets: Mapping[str, Data],
    settings: Settings,
    group: Group,
    *,
    is_resumed: bool,
) -> Built:
    """Wraps the parts."""
    cadence = cadence_of(settings, feed)
    strategy, base_hash = _spread(model, recipe, settings, group, is_resumed=is_resumed)
    parts = _parts(model, recipe, settings, feed)
    optimizers = [part.optimizer for part in parts]
    placement = placement_for_optimizers(model, feed.placement, optimizers, settings, group)
    feed = replace(feed, placement=placement)
    training = wrap_parts(
        model,
        parts,
        strategy=strategy,
        group=group,
        feed=feed,
        precision=settings.precision,
        grad_clip=settings.grad_clip,
        find_unused_parameters=settings.find_unused_parameters,
        has_checkpointed_activations=bool(settings.activation_checkpointing),
        tuning=settings.tuning,
        exact=settings.exact,
        buffers=recipe.buffers,
        frozen_in=frozen_in(model, recipe, feed=feed, group=group, cadence=cadence),
        may_split=settings.strategy in ("fsdp", "deepspeed"),
    )
    watch_steps(training, settings)
    if settings.ema:
        reshaped = training.forward_state.reshaped
        training.average = WeightAverage(model, decay=settings.ema, reshaped=reshaped)
    training.base_sha256 = base_hash
    training.notes += data_notes(feed, group)
    training.notes += split_notes(model, feed.plan, settings, group)
    evaluator = Evaluator(
        recipe=recipe,
        settings=settings,
        group=group,
        sets=sets,
        micro_batch=feed.plan.largest,
        placement=feed.placement,
        enter=strategy.enter,
        has_attribute=training.forward_state.has_attribute,
    )
    test_sets = made_sets(recipe.test_data, what="test", seed=settings.seed, group=group)
    evaluator.dry_run(model)
    evaluator.on(test_sets).compare_sets()
    training.notes += evaluator.notes
    training.notes += best_notes(
        settings.early_stop, evaluator.names, has_test=recipe.test_data is not None
    )
    return Built(
        training=training, feed=feed, evaluator=evaluator, test_sets=test_sets, cadence=cadence
    )


def _require_trained(model: nn.Module) -> None:
    """Raises: ConfigError if there is nothing to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "the model has nothing to train: it has no parameters, or all of them are frozen."
        )


def cadence_of(settings: Settings, feed: Feed) -> Cadence:
    """Returns when things happen in a run of this feed, at its place in the data.

    Raises: ConfigError if epochs were asked for and have no known length.
    """
    if settings.epochs and not feed.steps_per_epoch:
        raise ConfigError(
            f"--epochs {settings.epochs}: the training data is iterable and has no length, or less "
            f"than one global batch of {settings.global_batch}. Give it __len__, "
            "or type --epochs 0 --max-steps N."
        )
    end = _scheduled_steps(settings, feed)
    if settings.epochs:
        end += feed.cursor.ahead
    if settings.max_steps:
        end = min(end, settings.max_steps)
    return Cadence(
        end=end,
        steps_per_epoch=feed.steps_per_epoch,
        cursor=feed.cursor,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
    )


def _scheduled_steps(settings: Settings, feed: Feed) -> int:
    """Steps that schedules are told: those of the epochs if they are set, else `max_steps`."""
    if settings.epochs:
        return settings.epochs * feed.steps_per_epoch
    return settings.max_steps


def _spread(
    model: nn.Module, recipe: Recipe, settings: Settings, group: Group, *, is_resumed: bool
) -> tuple[Strategy, str]:
    """Chooses the strategy, and lets it split the model if it does.

    Returns: the strategy, and the hash of frozen weights that checkpoints leave out, else "".
    """
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    if not is_meta:
        require_equal(model, group=group)
    thaws = callable(recipe.frozen)
    require_splittable(model, settings, objectives=len(recipe.parts()), thaws=thaws)
    strategy = choose_strategy(group, settings)
    base_hash = ""
    if settings.save_trainable_only:
        _check_trainable_only(model, is_meta=is_meta, thaws=thaws)
        base_hash = base_sha256(model)
    strategy.shard(model)
    if is_meta:
        materialise(
            model,
            device=group.device,
            seed=settings.seed,
            offloads=settings.fsdp.cpu_offload,
            reads=_what_is_read(settings, is_resumed=is_resumed),
        )
        if settings.init_from:
            load_first_weights(model, settings, group)
    return strategy, base_hash


def _check_trainable_only(model: nn.Module, *, is_meta: bool, thaws: bool) -> None:
    if thaws:
        raise ConfigError(
            "--save-trainable-only: Recipe(frozen=...) is a function of the epoch, and what was "
            "trained once must be saved. Leave one of them out."
        )
    if all(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "--save-trainable-only has no effect: no parameter of the model is frozen. "
            "Leave it out."
        )
    if is_meta:
        raise ConfigError(
            "--save-trainable-only with --fsdp.meta: the frozen weights have no values yet whose "
            "hash could be kept."
        )


def _what_is_read(settings: Settings, *, is_resumed: bool) -> Reads:
    """Returns which values of the model come from elsewhere, as `materialise` takes it."""
    # With --init-partial what does not fit keeps its first values.
    if settings.init_partial and not is_resumed:
        return "nothing"
    if is_resumed or (settings.init_from and is_checkpoint(Path(settings.init_from))):
        return "all"
    return "file" if settings.init_from else "nothing"


def _parts(model: nn.Module, recipe: Recipe, settings: Settings, feed: Feed) -> list[Part]:
    """Builds each objective's optimizer and scheduler."""
    parts = []
    for objective in recipe.parts():
        optimizer = made_under_seed(
            objective.optimizer,
            part_of(model, objective.trains),
            seed=settings.seed,
            what=f"optimizer {objective.trains}",
        )
        require_steppable(optimizer, settings)
        scheduler = None
        if objective.scheduler:
            scheduler = made_under_seed(
                objective.scheduler,
                optimizer,
                _scheduled_steps(settings, feed),
                seed=settings.seed,
                what=f"scheduler {objective.trains}",
            )
        part = Part(
            loss=objective.loss, optimizer=optimizer, scheduler=scheduler, trains=objective.trains
        )
        parts.append(part)
    return parts
