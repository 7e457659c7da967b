"""One objective's live parts, and whether its optimizer and scheduler are what they should be.

Nothing is repaired here: an optimizer that does not hold what it should is named and the run ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.metrics import LossSum


@dataclass(frozen=True, kw_only=True)
class Part:
    """One objective's live parts.

    They are its loss, an optimizer over `trains`' parameters, and a scheduler stepped once per
    step.
    """

    loss: Callable[[Any, Any], LossSum]
    optimizer: Optimizer
    scheduler: Any = None
    trains: str = ""


def check_scheduler(part: Part) -> None:
    """Raises: ConfigError for a scheduler that would not move this optimizer's rates every step."""
    scheduler = part.scheduler
    if scheduler is None:
        return
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "ReduceLROnPlateau counts evaluations, schedulers here count optimizer steps: "
            "take one of ddp_kit.schedules."
        )
    if getattr(scheduler, "optimizer", part.optimizer) is not part.optimizer:
        raise ConfigError(
            "the scheduler belongs to another optimizer than the one it was given: "
            "build it from the function's argument."
        )


def part_of(model: nn.Module, trains: str) -> nn.Module:
    """Returns the part of a model that an objective trains.

    Raises: ConfigError if there is none of that name.
    """
    try:
        return model.get_submodule(trains)
    except AttributeError:
        near = nearest(trains, [name for name, _ in model.named_modules()])
        advice = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"Objective(trains={trains!r}): the model has no such part.{advice}"
        ) from None


def trained_by(model: nn.Module, part: Part, *, is_only: bool) -> list[nn.Parameter]:
    """Returns the parameters of an objective.

    Raises: ConfigError if its optimizer holds none, foreign ones, or not all of them.
    """
    module = part_of(model, part.trains)
    trained = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            trained[id(parameter)] = f"{part.trains}.{name}".lstrip(".")
    _check_optimizer(model, part, trained, is_only=is_only)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _check_optimizer(
    model: nn.Module, part: Part, trained: dict[int, str], *, is_only: bool
) -> None:
    """Compares what an optimizer holds with what it should: names of parameters by their `id`."""
    kind = type(part.optimizer).__name__
    every = {id(parameter) for parameter in model.parameters()}
    held: set[int] = set()
    for group in part.optimizer.param_groups:
        held.update(id(parameter) for parameter in group["params"])
    if not held & trained.keys():
        what = "parameters that are not this model's" if held else "no parameters"
        raise ConfigError(
            f"the optimizer ({kind}) holds {what}. "
            f"Build it from the model it is given: {kind}(model.parameters(), ...)."
        )
    if held - every:
        raise ConfigError(
            f"the optimizer ({kind}) holds {len(held - every)} tensors that are not parameters "
            "of the model."
        )
    missing = [name for identity, name in trained.items() if identity not in held]
    if missing:
        raise ConfigError(
            f"the optimizer ({kind}) does not hold {some(missing)}, which the model would train. "
            "Give it all of them, or freeze these with requires_grad_(False)."
        )
    if held & every - trained.keys() and not is_only:
        raise ConfigError(
            f"Objective(trains={part.trains!r}): its optimizer ({kind}) also holds parameters "
            "outside that part."
        )
