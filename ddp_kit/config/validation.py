"""What is wrong with settings, all at once, before any process group starts.

The values that one field may have stand with the field, in `ddp_kit.settings`; which fields go
together is here. Recipes, data and devices refuse for themselves, later.
"""

import typing
from collections.abc import Iterator
from typing import Literal

from ddp_kit.config.kinds import fits
from ddp_kit.config.rules import Rule, rules
from ddp_kit.errors import ConfigError, nearest
from ddp_kit.settings import DeepSpeed, EarlyStop, Fsdp, Settings, Wandb, flag, flatten


def check(settings: Settings) -> None:
    """Refuses settings that cannot be run.

    Raises: ConfigError with every fault of the values, each with what to type.
    """
    faults = [
        *_single_values(settings),
        *_length(settings),
        *_resuming(settings),
        *_early_stop(settings),
        *_bad_steps(settings),
        *_exact(settings),
        *_strategy(settings),
        *_split_strategy(settings),
    ]
    if settings.wandb != Wandb() and "wandb" not in settings.tracker:
        faults.append("--wandb.* is set without --tracker wandb: type --tracker wandb too")
    if faults:
        raise ConfigError("\n".join(faults))


def _single_values(settings: Settings) -> Iterator[str]:
    """Yields what is wrong with a field whatever the others are."""
    for name, rule in rules(type(settings)).items():
        value = getattr(settings, name)
        if _is_outside(value, rule):
            yield f"{flag(name)} {value}: expected {rule.expected}"
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if typing.get_origin(hint) is Literal and not fits(value, hint):
            yield f"{flag(name)} {value}: expected one of {typing.get_args(hint)}"
    if settings.global_batch == 0:
        yield "--global-batch 0: expected at least 1 sample per optimizer step"


def _is_outside(value: object, rule: Rule) -> bool:
    if not isinstance(value, int | float):
        return False
    # Not the other way round, since nan is neither less nor more.
    is_enough = rule.least is None or value >= rule.least
    is_little_enough = rule.below is None or value < rule.below
    return not (is_enough and is_little_enough)


def _length(settings: Settings) -> Iterator[str]:
    if settings.epochs == 0 and settings.max_steps == 0:
        yield (
            "neither epochs nor max_steps is set, so the run has no end:"
            " type --epochs N or --max-steps N"
        )


def _resuming(settings: Settings) -> Iterator[str]:
    if settings.change:
        known = [*flatten(settings), "recipe", "data"]
        for name in settings.change:
            own = name.lstrip("-").replace("-", "_")
            if own not in known:
                near = nearest(own, known) or "none"
                yield f"--change {name}: there is no such setting. Near: {near}"
    for pair in settings.rename:
        if pair.count("=") != 1:
            yield f"--rename {pair}: expected old=new"
    if not settings.init_from:
        for name in ("rename", "init_partial"):
            if getattr(settings, name):
                yield f"{flag(name)} has an effect with --init-from only"


def _early_stop(settings: Settings) -> Iterator[str]:
    early = settings.early_stop
    if early.patience < 1 or not early.min_delta >= 0:
        yield (
            f"--early-stop.patience {early.patience} --early-stop.min-delta {early.min_delta}:"
            " expected at least 1 and 0"
        )
    if not early.metric and early != EarlyStop():
        yield (
            "--early-stop.* is set without --early-stop.metric:"
            " type --early-stop.metric loss, or another evaluation metric"
        )


def _bad_steps(settings: Settings) -> Iterator[str]:
    """Yields what has no effect, as long as nobody asks for it."""
    defaults = Settings()
    if settings.on_spike == "off":
        for name in ("spike_z", "spike_window"):
            if getattr(settings, name) != getattr(defaults, name):
                yield f"{flag(name)} is set without --on-spike: type --on-spike stop too"
    drops = {"skip", "rollback"} & {settings.on_nonfinite, settings.on_spike}
    if settings.max_dropped != defaults.max_dropped and not drops:
        yield (
            "--max-dropped is set where no step is dropped:"
            " type --on-nonfinite skip or rollback too"
        )


def _exact(settings: Settings) -> Iterator[str]:
    """Yields what of the settings cannot be had exactly."""
    if not settings.exact:
        return
    micro = settings.micro_batch
    whole = settings.global_batch
    if not isinstance(micro, int) or micro < 1 or whole % micro:
        parts = next(parts for parts in (8, 4, 2, 1) if whole % parts == 0)
        yield (
            f"--exact with --micro-batch {micro}: expected a stated size that divides"
            f" --global-batch {whole}, since the micro-batches are what is the same at any number"
            f" of ranks. Type --micro-batch {max(1, whole // parts)} for up to {parts} ranks"
        )
    if settings.sync_batchnorm:
        yield (
            "--exact with --sync-batchnorm: it sums over ranks inside the forward pass."
            " Leave one of them out"
        )


def without_strategy(name: str) -> str:
    """Returns what to say of a strategy's own flags where another one is chosen."""
    return f"--{name}.* is set without --strategy {name}: type --strategy {name} too"


def _strategy(settings: Settings) -> Iterator[str]:
    """Yields what does not go together with the strategy, whichever it is."""
    chosen = settings.strategy
    if settings.fsdp != Fsdp() and chosen != "fsdp":
        yield without_strategy("fsdp")
    if settings.deepspeed != DeepSpeed() and chosen != "deepspeed":
        yield without_strategy("deepspeed")
    if settings.exact and chosen != "ddp":
        yield (
            f"--exact with --strategy {chosen}: sums have a fixed order with ddp only."
            " Type --strategy ddp, or leave --exact out"
        )
    if settings.comm != "fp32" and (settings.exact or chosen not in ("ddp", "zero1")):
        what = "--exact" if settings.exact else f"--strategy {chosen}"
        yield (
            f"--comm {settings.comm} with {what}: it is a hook of DDP that rounds gradients."
            " Leave --comm out"
        )


def _split_strategy(settings: Settings) -> Iterator[str]:
    """Yields what does not go together with a strategy that splits the model."""
    chosen = settings.strategy
    if chosen not in ("fsdp", "deepspeed"):
        return
    if settings.sdc_check:
        yield (
            f"--strategy {chosen} with --sdc-check: a rank has no whole model that it could compute"
            " with twice. Type --strategy zero1 or ddp"
        )
    if settings.find_unused_parameters:
        yield (
            f"--strategy {chosen} with --find-unused-parameters:"
            " ranks that use other parameters would wait. Type --strategy ddp"
        )
    if settings.micro_batch == "auto":
        yield (
            f"--strategy {chosen} with --micro-batch auto:"
            " it tries sizes out on the whole model. Type a size"
        )
    if settings.fsdp.cpu_offload and settings.precision == "fp16":
        yield (
            "--fsdp.cpu-offload with --precision fp16: overflows are looked for on the GPU."
            " Type --precision bf16"
        )
    if settings.fsdp.cpu_offload and settings.fsdp.hybrid:
        yield (
            "--fsdp.cpu-offload with --fsdp.hybrid: NCCL does not reach host memory for a node's"
            " norm. Leave one of them out"
        )
    if settings.fsdp.wrap_size < 0:
        yield (f"--fsdp.wrap-size {settings.fsdp.wrap_size}: expected a number of parameters, or 0")
    if chosen == "deepspeed" and settings.precision == "fp64":
        yield (
            "--strategy deepspeed with --precision fp64: it keeps weights in fp32."
            " Type --precision fp32"
        )
