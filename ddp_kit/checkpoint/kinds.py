"""What optimizers and schedules are called in a checkpoint: none goes on from another's state.

It would find keys missing, or find them all and mean another thing by them.
"""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from ddp_kit.checkpoint.hyperparameters import KEEPS_OWN
from ddp_kit.errors import ConfigError, some
from ddp_kit.training.optimizer_marks import inner_optimizers
from ddp_kit.training.state import ObjectiveState

# What torch's schedules put into groups.
OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def kind_of(optimizer: Optimizer) -> str:
    """Returns what an optimizer is, with those that it wraps."""
    inner = [kind_of(each) for each in inner_optimizers(optimizer).values()]
    return _with_inner(_name(optimizer), inner)


def kind_of_schedule(scheduler: Any) -> str:
    """Returns what a schedule is, with those that it is made of; "" for none."""
    if scheduler is None:
        return ""
    inner = [kind_of_schedule(each) for each in getattr(scheduler, "_schedulers", ())]
    return _with_inner(_name(scheduler), inner)


def _name(made: Any) -> str:
    """Returns the name of an object's class; torch's are told from others of that name."""
    kind = type(made)
    return f"torch.{kind.__name__}" if kind.__module__.startswith("torch.") else kind.__name__


def _with_inner(name: str, inner: list[str]) -> str:
    return f"{name}({', '.join(inner)})" if inner else name


def require_same_kinds(
    objective: ObjectiveState,
    saved: Mapping[str, Any],
    *,
    where: str,
    keeps_hyperparameters: bool,
) -> None:
    """Compares an objective's optimizer and schedule with those that its state was saved from.

    Args: `where` it was; `keeps_hyperparameters` as `restore_state` has it: a schedule that is
        built anew may be another one.
    Raises: ConfigError if they are others.
    """
    optimizer = objective.optimizer
    built = kind_of(optimizer)
    # Checkpoints of before do not say it.
    was = saved.get("optimizer", built)
    if was != built:
        raise ConfigError(
            f"{where} holds the state of the optimizer {was}, and this attempt builds {built}. "
            f"{_advice(was)}"
        )
    _require_same_keys(optimizer, saved, kind=built, where=where)
    if not keeps_hyperparameters:
        return
    built = kind_of_schedule(objective.scheduler)
    was = saved.get("schedule", built)
    has_state = saved["scheduler"] is not None
    if was != built or has_state != bool(built):
        raise ConfigError(
            f"{where} holds the state of {_schedule(was, has_state)}, and this attempt builds "
            f"{_schedule(built, bool(built))}. {_advice('it')}"
        )


def _schedule(kind: str, is_there: bool) -> str:
    return f"the schedule {kind}".rstrip() if is_there else "no schedule"


def _advice(was: str) -> str:
    return (
        f"Build {was} again, or start a new run from the weights alone: --init-from with this "
        "checkpoint, and another --run-dir."
    )


def _require_same_keys(
    optimizer: Optimizer, saved: Mapping[str, Any], *, kind: str, where: str
) -> None:
    """Raises: ConfigError if groups have keys of another kind of optimizer in place of this one's.

    A later torch may have given it more of them.
    """
    for i, (own, group) in enumerate(zip(optimizer.param_groups, saved["groups"], strict=True)):
        unknown = group.keys() - own.keys() - OF_SCHEDULES
        if "counted" in saved:
            unknown -= set(saved["counted"][i])
        missing = optimizer.defaults.keys() - group.keys() - KEEPS_OWN
        if unknown and missing:
            raise ConfigError(
                f"{where} holds the state of an optimizer with {some(sorted(unknown))}, and this "
                f"attempt builds {kind}, which has {some(sorted(missing))}. "
                f"{_advice('that optimizer')}"
            )
