"""From a recipe and its settings to the parts of a run on this rank.

Owns: the order in which a recipe's factories are called, and which settings reach which part.
Refuses: running anything but what the start needs (rehearsal, one evaluation micro-batch).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ddp_kit.checkpoint.find import is_checkpoint
from ddp_kit.checkpoint.retention import best_notes
from ddp_kit.checkpoint.weights import base_sha256, load_weights, require_equal
from ddp_kit.config.secrets import is_secret_setting
from ddp_kit.data.batch_plan import BatchPlan, plan_batches, splits_that_keep
from ddp_kit.data.dataset import Data, as_data
from ddp_kit.data.loader import Feed, build_loader, feed_of
from ddp_kit.data.seeding import Purpose, generators_put_back, key
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.collectives import first_difference, gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import REDACTED, logger
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings, digest, flag, flatten
from ddp_kit.setup.find_batch_size import find_micro_batch
from ddp_kit.setup.meta_init import materialise
from ddp_kit.setup.wrap import Part, checkpoint_activations, part_of, wrap_parts
from ddp_kit.strategies import choose_strategy
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.checks import require_splittable
from ddp_kit.strategies.optimizers import wants_channels_last
from ddp_kit.strategies.precision import placed, weight_dtype
from ddp_kit.training.ema import WeightAverage
from ddp_kit.training.evaluator import Evaluator, data_sets
from ddp_kit.training.loop import Pace
from ddp_kit.training.running_stats import buffers_put_back
from ddp_kit.training.state import LossCall, Training


def require_same_settings(group: Group, settings: Settings, *, text: str) -> None:
    """Raises: ConfigError on every rank if the ranks were started with different settings or another recipe text."""
    fields = flatten(settings) | {"recipe's text": text}
    names = list(fields)
    at = first_difference(
        group, [digest("\n".join(names)), *(digest(fields[name]) for name in names)]
    )
    if at is None:
        return
    if at == 0:
        raise ConfigError(
            "the ranks run different recipes: their Settings have different fields. Start all of them with one command."
        )
    name = names[at - 1]
    if name == "recipe's text":
        raise ConfigError(
            "the ranks read different texts of the recipe. All nodes must see the same files."
        )
    values = [value.decode() for value in gather_bytes(group, fields[name].encode())]
    is_hidden = any(is_secret_setting(name, value) for value in values)
    shown = ", ".join(
        f"{REDACTED if is_hidden else value} on rank {values.index(value)}"
        for value in dict.fromkeys(values)
    )
    raise ConfigError(
        f"the ranks were started with different settings: {flag(name)} is {shown}. Start all of them with one command."
    )


def build_model(recipe: Recipe, settings: Settings, group: Group) -> nn.Module:
    """Returns the model on this rank's device, from weights that depend on the seed alone (or on `init_from`)."""
    is_split = (
        settings.strategy == "fsdp" and group.world_size > 1
    )  # the strategy moves it, part by part
    is_meta = is_split and settings.fsdp.meta
    with generators_put_back(), torch.device("meta") if is_meta else nullcontext():
        torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
        model = recipe.model()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the recipe's model() must return an nn.Module; it returned {type(model).__name__}."
        )
    lazy = [
        name
        for name, tensor in model.named_parameters()
        if isinstance(tensor, nn.parameter.UninitializedParameter)
    ]
    if lazy:
        raise ConfigError(
            f"the model's {lazy[0]} has no shape yet (a lazy module): run one batch through it in the recipe's model()."
        )
    if settings.init_from and not is_meta:
        load_weights(
            model,
            Path(settings.init_from),
            group=group,
            rename=settings.rename,
            partial=settings.init_partial,
        )
    if settings.fsdp.cpu_offload and group.device.type == "cpu":
        raise ConfigError(
            "--fsdp.cpu-offload: this rank runs on a CPU, where weights are in host memory anyway. Leave it out."
        )
    if settings.sync_batchnorm:
        if group.device.type != "cuda":
            raise ConfigError(
                "--sync-batchnorm: torch's SyncBatchNorm runs on CUDA only; this rank runs on a CPU. Leave it out."
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group.training)
    device = "meta" if is_meta else "cpu" if is_split else group.device
    model = placed(model, device=device, dtype=weight_dtype(settings.precision))
    if has_channels_last(model, settings):
        model = model.to(memory_format=torch.channels_last)
    if settings.activation_checkpointing:
        checkpoint_activations(model, settings.activation_checkpointing)
    if settings.compile:
        model.compile()
    return model


def has_channels_last(model: nn.Module, settings: Settings) -> bool:
    """Whether a model is given that memory format, which neither FSDP2 nor ZeRO can split."""
    return (
        settings.tuning
        and settings.strategy not in ("fsdp", "deepspeed")
        and wants_channels_last(model)
    )


def placement_of(model: nn.Module, settings: Settings, group: Group) -> Placement:
    """Returns where the batches of a model have to be."""
    return Placement(
        group.device,
        dtype=weight_dtype(settings.precision),
        channels_last=has_channels_last(model, settings),
    )


def settle_memory_format(
    model: nn.Module, placement: Placement, trial: Callable[[], object]
) -> Placement:
    """Returns the placement to use: without channels_last if the model reshapes in a way that this format does not allow.

    `trial` runs the model on a batch; what it changes in buffers and generators is put back.
    """
    if not placement.channels_last:
        return placement
    try:
        with torch.no_grad(), generators_put_back(), buffers_put_back(model):
            trial()
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        model.to(memory_format=torch.contiguous_format)
        logger.info(
            "note: channels_last is off, since the model reshapes with view(); flatten(1) or reshape() would allow it"
        )
        return Placement(placement.device, dtype=placement.dtype, channels_last=False)
    return placement


@dataclass(kw_only=True)
class Composition:
    """The parts of a run on this rank."""

    training: Training
    feed: Feed
    evaluator: Evaluator
    pace: Pace


def compose(
    recipe: Recipe, settings: Settings, group: Group, *, is_resumed: bool = False
) -> Composition:
    """Calls the recipe's factories and wraps what they give. Every rank calls it. `is_resumed`: a checkpoint's state will follow."""
    model = build_model(recipe, settings, group)
    data = as_data(recipe.train_data())
    placement = placement_of(model, settings, group)
    placement = settle_memory_format(
        model, placement, lambda: _run_losses(model, recipe, data, placement, settings, group)
    )
    micro_batch = settings.micro_batch
    if micro_batch == "auto":
        micro_batch = find_micro_batch(
            model, recipe.parts(), data, placement=placement, settings=settings, group=group
        )
    feed = build_loader(
        data,
        group=group,
        global_batch=settings.global_batch,
        micro_batch=micro_batch,
        seed=settings.seed,
        num_workers=settings.num_workers,
        placement=placement,
    )
    pace = _pace(settings, feed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "the model has nothing to train: it has no parameters, or all of them are frozen."
        )
    strategy, base = _spread(model, recipe, settings, group, is_resumed=is_resumed)
    parts = []
    for objective in recipe.parts():
        optimizer = objective.optimizer(part_of(model, objective.trains))
        scheduler = (
            objective.scheduler(optimizer, _scheduled_steps(settings, feed))
            if objective.scheduler
            else None
        )
        parts.append(
            Part(
                loss=objective.loss,
                optimizer=optimizer,
                scheduler=scheduler,
                trains=objective.trains,
            )
        )
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
    )
    if settings.ema:
        training.average = WeightAverage(model, decay=settings.ema)
    training.base_sha256 = base
    training.notes += _split_notes(model, feed.plan, settings, group)
    sets = data_sets(recipe.eval_data(), what="evaluation") if recipe.eval_data else {}
    evaluator = Evaluator(
        recipe=recipe,
        settings=settings,
        group=group,
        sets=sets,
        micro_batch=feed.plan.largest,
        placement=placement,
        enter=strategy.enter,
    )
    evaluator.rehearse(model)
    training.notes += best_notes(
        settings.early_stop, evaluator.names, has_test=recipe.test_data is not None
    )
    return Composition(training=training, feed=feed, evaluator=evaluator, pace=pace)


def _spread(
    model: nn.Module, recipe: Recipe, settings: Settings, group: Group, *, is_resumed: bool
) -> tuple[Strategy, str]:
    """Returns the strategy, which has split the model if it does, and the hash of frozen weights that checkpoints leave out, else ""."""
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    if not is_meta:
        require_equal(model, group=group)
    require_splittable(model, settings, objectives=len(recipe.parts()))
    strategy = choose_strategy(group, settings)
    if settings.save_trainable_only and all(
        parameter.requires_grad for parameter in model.parameters()
    ):
        raise ConfigError(
            "--save-trainable-only has no effect: no parameter of the model is frozen. Leave it out."
        )
    if settings.save_trainable_only and is_meta:
        raise ConfigError(
            "--save-trainable-only with --fsdp.meta: the frozen weights have no values yet whose hash could be kept."
        )
    base = base_sha256(model) if settings.save_trainable_only else ""
    strategy.shard(model)
    if is_meta:
        is_partial = (
            settings.init_partial and not is_resumed
        )  # what does not fit keeps its first values
        has_all = is_resumed or bool(settings.init_from and is_checkpoint(Path(settings.init_from)))
        materialise(
            model,
            device=group.device,
            seed=settings.seed,
            offloads=settings.fsdp.cpu_offload,
            reads="all"
            if has_all and not is_partial
            else "file"
            if settings.init_from and not is_partial
            else "nothing",
        )
        if settings.init_from:
            load_weights(
                model,
                Path(settings.init_from),
                group=group,
                rename=settings.rename,
                partial=settings.init_partial,
            )
    return strategy, base


def _run_losses(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    placement: Placement,
    settings: Settings,
    group: Group,
) -> None:
    """Runs the losses on two samples, as many as BatchNorm needs."""
    plan = plan_batches(min(2, settings.global_batch), micro_batch=0, world_size=1)
    feed = feed_of(
        data,
        plan=plan,
        rank=0,
        seed=settings.seed,
        placement=placement,
        num_workers=settings.num_workers,
    )
    batch = feed.dry_run_batch().batch
    for part in recipe.parts():
        LossCall(model, part.loss, precision=settings.precision, device=group.device)(batch)


def _scheduled_steps(settings: Settings, feed: Feed) -> int:
    """Steps that schedules are told: those of the epochs if they are set, else `max_steps`."""
    return settings.epochs * feed.steps_per_epoch if settings.epochs else settings.max_steps


def _pace(settings: Settings, feed: Feed) -> Pace:
    if settings.epochs and not feed.steps_per_epoch:
        raise ConfigError(
            f"--epochs {settings.epochs}: the training data is iterable and has no length, or less than one global batch of "
            f"{settings.global_batch}. Give it __len__, or type --epochs 0 --max-steps N."
        )
    whole = _scheduled_steps(settings, feed)
    end = min(whole, settings.max_steps) if settings.max_steps else whole
    return Pace(
        end=end,
        steps_per_epoch=feed.steps_per_epoch,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
    )


def _split_notes(model: nn.Module, plan: BatchPlan, settings: Settings, group: Group) -> list[str]:
    """Says which layers make the numbers depend on the split, and which flag mends it."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    layers = sorted(
        {type(module).__name__ for module in model.modules() if isinstance(module, kinds)}
    )
    if not layers or plan.is_invariant or settings.sync_batchnorm or group.world_size == 1:
        return []
    keeps = splits_that_keep(settings.global_batch, world_size=group.world_size)
    mend = f"--micro-batch {keeps} keeps the numbers the same on 1 to {settings.global_batch // keeps} ranks"
    if keeps == 1:  # which BatchNorm cannot normalise
        mend = "no --micro-batch mends it; a --global-batch with more divisors would"
    return [
        f"{', '.join(layers)} see one micro-batch at a time, and at another number of ranks it would be another one: {mend}"
    ]
