"""What models, optimizers and settings must be like for fsdp, deepspeed and zero1.

What cannot be split over ranks is refused before training starts: by one process as by many, and by
`ddp-kit plan`. Whole copies on each rank (ddp) can do anything.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.errors import ConfigError, require, some
from ddp_kit.settings import Settings
from ddp_kit.strategies.deepspeed.config import config_of
from ddp_kit.strategies.fsdp_modules import modules_to_wrap
from ddp_kit.strategies.fused_step import is_dense
from ddp_kit.strategies.outside_use import DerivedReadGuard, reads_numbers
from ddp_kit.strategies.whole import arguments_of


def require_splittable(
    model: nn.Module, settings: Settings, *, objectives: int, thaws: bool = False
) -> None:
    """Checks that the chosen strategy can split a model that is trained by so many objectives.

    Args: `thaws` whether parameters are frozen in some epochs.
    Raises: ConfigError for what `--strategy` cannot split, or if its package or file is missing.
        Another strategy takes anything.
    """
    chosen = settings.strategy
    _require_real(model, settings)
    if chosen == "zero1":
        _require_dense(model)
    if chosen not in ("fsdp", "deepspeed"):
        return
    if thaws:
        raise ConfigError(
            f"--strategy {chosen} splits gradients and their sums as the parameters are trained at "
            "the start, and Recipe(frozen=...) is a function of the epoch. Type --strategy ddp or "
            "zero1, or freeze for the whole run, by a list."
        )
    if objectives > 1:
        raise ConfigError(
            f"--strategy {chosen}: it trains one objective, the recipe has {objectives}. "
            "Type --strategy zero1."
        )
    if chosen == "fsdp":
        modules_to_wrap(model, settings.fsdp)
    else:
        config_of(settings.deepspeed)
        # Looked for before it is imported: that is to happen where its environment is set.
        if importlib.util.find_spec("deepspeed") is None:
            require("deepspeed", extra="deepspeed")
        if not settings.deepspeed.stage:
            return
    _require_contiguous_tensors(model, chosen)


def _require_dense(model: nn.Module) -> None:
    """Raises: ConfigError for parameters that are views of every second column or the like: what is
    sent of them would be what lies between, too."""
    named = model.named_parameters()
    views = [name for name, parameter in named if not is_dense(parameter)]
    if views:
        raise ConfigError(
            f"--strategy zero1 sends weights as they lie in memory: {some(views)} is a view of a "
            "part of other memory. Make it contiguous(), or type --strategy ddp."
        )


def _require_contiguous_tensors(model: nn.Module, chosen: str) -> None:
    """Raises: ConfigError for parameters of no dimension, or of other strides."""
    named = list(model.named_parameters())
    scalars = [name for name, parameter in named if not parameter.dim()]
    if scalars:
        raise ConfigError(
            f"--strategy {chosen} cannot split a scalar: give {some(scalars)} the shape (1,), or "
            "type --strategy zero1."
        )
    strided = [name for name, parameter in named if not parameter.is_contiguous()]
    if strided:
        raise ConfigError(
            f"--strategy {chosen} splits memory that is contiguous: {some(strided)} is a view of "
            "other strides. Make it contiguous(), or type --strategy zero1."
        )


def _require_real(model: nn.Module, settings: Settings) -> None:
    """Refuses complex parameters whose imaginary parts would be lost, or cannot be laid beside
    real ones. Complex buffers are left as they are by all strategies.

    Raises: ConfigError for such a parameter.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_complex()]
    if not names:
        return
    if settings.strategy != "ddp":
        raise ConfigError(
            f"--strategy {settings.strategy} cannot split complex parameters: {some(names)}. "
            "Type --strategy ddp."
        )
    if settings.comm != "fp32":
        raise ConfigError(
            f"--comm {settings.comm} would send the real parts alone of {some(names)}, which are "
            "complex. Leave it out."
        )


def require_steppable(optimizer: Optimizer, settings: Settings) -> None:
    """Checks that an optimizer can step what the chosen strategy makes of the weights: here, on
    one rank too, and not only where they are split.

    Raises: ConfigError if it cannot.
    """
    if settings.strategy == "zero1":
        require_separate(optimizer)
    elif settings.strategy == "deepspeed":
        require_elementwise(optimizer, stage=settings.deepspeed.stage)
    elif settings.strategy == "fsdp" and type(optimizer).__module__.startswith("torch.optim"):
        # Another one may know of split tensors, and is watched in its first step.
        _require_no_reads(optimizer)


def _require_no_reads(optimizer: Optimizer) -> None:
    """Raises: ConfigError if an optimizer reads numbers off weights or gradients."""
    message = reads_numbers(optimizer)
    try:
        with DerivedReadGuard(message) as guard:
            _stepped(optimizer, _small_and_large(), guard=guard)
    except ConfigError:
        raise
    except Exception:
        # What it needs to be built and stepped is for its first step to say.
        return


def require_elementwise(optimizer: Optimizer, *, stage: int) -> None:
    """Tries out whether an optimizer steps many parameters laid into one as it steps each.

    DeepSpeed lays them so. The trial is on small tensors.

    Raises: ConfigError if it does not, has state before its first step, or a group with nothing to
        train.
    """
    kind = type(optimizer).__name__
    if stage and optimizer.state:
        raise ConfigError(
            f"--strategy deepspeed: the optimizer ({kind}) has state before the first step, which "
            "DeepSpeed cannot split. Type --strategy fsdp, or --deepspeed.stage 0."
        )
    for i, group in enumerate(optimizer.param_groups):
        if not any(parameter.requires_grad for parameter in group["params"]):
            raise ConfigError(
                f"--strategy deepspeed: parameter group {i} of the optimizer ({kind}) has "
                "nothing to train: leave it out."
            )
    if not stage:
        return
    why = "DeepSpeed lays parameters into one, and it would step them otherwise than each by itself"
    laid_into_one = torch.cat([tensor.flatten() for tensor in _small_and_large()])
    try:
        together = _stepped(optimizer, [laid_into_one])
        if torch.allclose(_stepped_alone(optimizer), together, rtol=1e-5):
            return
    except Exception as error:  # whatever an optimizer raises
        why = f"it cannot be tried out on a tensor of one dimension ({error})"
    raise ConfigError(
        f"--strategy deepspeed: the optimizer is {kind}: {why}. "
        "Type --strategy zero1 or ddp, or --deepspeed.stage 0."
    )


def require_separate(optimizer: Optimizer) -> None:
    """Tries out on small tensors whether an optimizer steps each parameter by itself.

    With zero1 a rank steps some of them.

    Raises: ConfigError if it takes something over all of them, a norm for instance, which would be
        another on each rank.
    """
    try:
        together = _stepped(optimizer, _small_and_large())
        is_separate = torch.allclose(_stepped_alone(optimizer), together, rtol=1e-5)
    except Exception:
        # Whatever an optimizer raises: what it needs to be built and stepped is for its first step
        # to say.
        return
    if not is_separate:
        raise ConfigError(
            f"--strategy zero1: {type(optimizer).__name__} takes something over all parameters at "
            "once, of which each rank steps some. Type --strategy ddp, or fsdp."
        )


def _small_and_large() -> list[torch.Tensor]:
    return [torch.linspace(0.1, 0.4, 4).view(2, 2), torch.linspace(10.0, 60.0, 6).view(2, 3)]


def _stepped_alone(optimizer: Optimizer) -> torch.Tensor:
    """Returns what optimizers of that kind make of the tensors, one each."""
    return torch.cat([_stepped(optimizer, [tensor]) for tensor in _small_and_large()])


def _stepped(
    optimizer: Optimizer, tensors: list[torch.Tensor], *, guard: DerivedReadGuard | None = None
) -> torch.Tensor:
    """Returns what two steps of such an optimizer make of the tensors, flat."""
    parameters = [nn.Parameter(tensor.clone()) for tensor in tensors]
    made: Any = type(optimizer)(parameters, **arguments_of(optimizer))
    for _ in range(2):
        for parameter in parameters:
            # A gradient of no fixed ratio to the parameter.
            parameter.grad = parameter.detach().cos()
            if guard is not None:
                guard.watch(parameter, parameter.grad)
        made.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
