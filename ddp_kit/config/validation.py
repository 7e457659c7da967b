"""What is wrong with settings, all at once, before any process group starts.

Owns: the values that a field may have, and which fields go together.
Refuses: looking at recipes, data or devices: those refuse for themselves, later.
"""

import typing
from typing import Literal

from ddp_kit.errors import ConfigError, nearest
from ddp_kit.settings import DeepSpeed, EarlyStop, Fsdp, Settings, Wandb, fits, flag, flatten


def check(settings: Settings) -> None:
    """Raises: ConfigError with every fault of the values, each with what to type."""
    counts = (
        "global_batch",
        "epochs",
        "max_steps",
        "eval_every",
        "num_workers",
        "threads",
        "grad_clip",
        "save_every",
        "save_minutes",
        "max_hours",
        "keep_every",
    )
    faults = [
        f"{flag(name)} {getattr(settings, name)}: expected 0 or more"
        for name in counts
        if not getattr(settings, name) >= 0
    ]
    hints = typing.get_type_hints(type(settings))
    chosen = {
        name: (getattr(settings, name), hint)
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal
    }
    faults += [
        f"{flag(name)} {value}: expected one of {typing.get_args(hint)}"
        for name, (value, hint) in chosen.items()
        if not fits(value, hint)
    ]
    if settings.global_batch == 0:
        faults.append("--global-batch 0: expected at least 1 sample per optimizer step")
    if isinstance(settings.micro_batch, int) and settings.micro_batch < 0:
        faults.append(
            f"--micro-batch {settings.micro_batch}: expected at least 1 sample, or 0 for a rank's whole share"
        )
    if settings.exact:
        faults += _inexact(settings)
    if settings.log_every < 1:
        faults.append(f"--log-every {settings.log_every}: expected at least 1 step")
    if settings.epochs == 0 and settings.max_steps == 0:
        faults.append(
            "neither epochs nor max_steps is set, so the run has no end: type --epochs N or --max-steps N"
        )
    if settings.keep < 1:
        faults.append(f"--keep {settings.keep}: expected at least 1 checkpoint")
    named = {name: name.lstrip("-").replace("-", "_") for name in settings.change}
    known = [*flatten(settings), "recipe"] if settings.change else []
    faults += [
        f"--change {name}: there is no such setting. Near: {nearest(own, known) or 'none'}"
        for name, own in named.items()
        if own not in known
    ]
    faults += [
        f"--rename {pair}: expected old=new" for pair in settings.rename if pair.count("=") != 1
    ]
    if not settings.init_from:
        faults += [
            f"{flag(name)} has an effect with --init-from only"
            for name in ("rename", "init_partial")
            if getattr(settings, name)
        ]
    if not 0 <= settings.ema < 1:
        faults.append(
            f"--ema {settings.ema}: expected a decay from 0 (off) to below 1, for instance 0.999"
        )
    if not 0 <= settings.seed < 2**63:
        faults.append(f"--seed {settings.seed}: expected 0 to 2^63 - 1")
    early = settings.early_stop
    if early.patience < 1 or not early.min_delta >= 0:
        faults.append(
            f"--early-stop.patience {early.patience} --early-stop.min-delta {early.min_delta}: expected at least 1 and 0"
        )
    if not early.metric and early != EarlyStop():
        faults.append(
            "--early-stop.* is set without --early-stop.metric: type --early-stop.metric loss, or another evaluation metric"
        )
    faults += _strategy_faults(settings)
    if settings.wandb != Wandb() and "wandb" not in settings.tracker:
        faults.append("--wandb.* is set without --tracker wandb: type --tracker wandb too")
    if faults:
        raise ConfigError("\n".join(faults))


def _inexact(settings: Settings) -> list[str]:
    """Returns what of the settings cannot be had exactly."""
    micro, whole = settings.micro_batch, settings.global_batch
    faults = []
    if not isinstance(micro, int) or micro < 1 or whole % micro:
        parts = next(parts for parts in (8, 4, 2, 1) if whole % parts == 0)
        faults.append(
            f"--exact with --micro-batch {micro}: expected a stated size that divides --global-batch {whole}, since the micro-batches are "
            f"what is the same at any number of ranks. Type --micro-batch {max(1, whole // parts)} for up to {parts} ranks"
        )
    if settings.sync_batchnorm:
        faults.append(
            "--exact with --sync-batchnorm: it sums over ranks inside the forward pass. Leave one of them out"
        )
    return faults


def without_strategy(name: str) -> str:
    """Returns what to say of a strategy's own flags where another one is chosen."""
    return f"--{name}.* is set without --strategy {name}: type --strategy {name} too"


def _strategy_faults(settings: Settings) -> list[str]:
    """Returns what does not go together with the strategy."""
    chosen = settings.strategy
    faults = [
        without_strategy(name)
        for name, unset in (("fsdp", Fsdp()), ("deepspeed", DeepSpeed()))
        if getattr(settings, name) != unset and chosen != name
    ]
    if settings.exact and chosen != "ddp":
        faults.append(
            f"--exact with --strategy {chosen}: sums have a fixed order with ddp only. Type --strategy ddp, or leave --exact out"
        )
    if settings.comm != "fp32" and (settings.exact or chosen not in ("ddp", "zero1")):
        what = "--exact" if settings.exact else f"--strategy {chosen}"
        faults.append(
            f"--comm {settings.comm} with {what}: it is a hook of DDP that rounds gradients. Leave --comm out"
        )
    if chosen not in ("fsdp", "deepspeed"):
        return faults
    if settings.find_unused_parameters:
        faults.append(
            f"--strategy {chosen} with --find-unused-parameters: ranks that use other parameters would wait. Type --strategy ddp"
        )
    if settings.micro_batch == "auto":
        faults.append(
            f"--strategy {chosen} with --micro-batch auto: it tries sizes out on the whole model. Type a size"
        )
    if settings.fsdp.cpu_offload and settings.precision == "fp16":
        faults.append(
            "--fsdp.cpu-offload with --precision fp16: overflows are looked for on the GPU. Type --precision bf16"
        )
    if settings.fsdp.cpu_offload and settings.fsdp.hybrid:
        faults.append(
            "--fsdp.cpu-offload with --fsdp.hybrid: NCCL does not reach host memory for a node's norm. Leave one of them out"
        )
    if settings.fsdp.wrap_size < 0:
        faults.append(
            f"--fsdp.wrap-size {settings.fsdp.wrap_size}: expected a number of parameters, or 0"
        )
    if chosen == "deepspeed" and settings.precision == "fp64":
        faults.append(
            "--strategy deepspeed with --precision fp64: it keeps weights in fp32. Type --precision fp32"
        )
    return faults
