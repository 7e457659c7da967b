"""The optimizer's part of a run's state: what it keeps of each parameter, its numbers and its
schedule, by parameter name, so that another world size or strategy can read it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddp_kit.checkpoint.format.encoding import decode, encode, references
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.hyperparameters import (
    KEEPS_OWN,
    counted_keys,
    with_own_hyperparameters,
)
from ddp_kit.checkpoint.kinds import kind_of, kind_of_schedule
from ddp_kit.checkpoint.optimizer_rest import has_own_state_dict, rest_of
from ddp_kit.checkpoint.optimizer_rest_back import restore_rest
from ddp_kit.distributed.local_shard import Item, held, memory_of
from ddp_kit.errors import ConfigError
from ddp_kit.training.state import ObjectiveState


def objective_values(
    objective: ObjectiveState, names: Mapping[int, str], items: dict[str, Item]
) -> dict[str, Any]:
    """Returns an objective's state as JSON values; its tensors go into `items`.

    Args: `names` of the parameters by their `id`.
    Raises: ConfigError for state that is not tensors and plain data, or cannot be split.
    """
    prefix = f"optimizer/{objective.name}"
    groups = []
    states = {}
    shared: dict[str, torch.Tensor] = {}
    for i, group in enumerate(objective.optimizer.param_groups):
        own = {key: value for key, value in group.items() if key not in KEEPS_OWN}
        groups.append(encode(own, shared, name=f"{prefix}group.{i}"))
    view = objective.optimizer_view
    # One that says itself what its state is has it in its rest.
    kept_by_us = [] if has_own_state_dict(view.stepped) else view.items()
    for parameter, kept in kept_by_us:
        name = names[id(parameter)]
        found: dict[str, torch.Tensor] = {}
        states[name] = {
            key: encode(value, found, name=f"{prefix}{name}/{key}") for key, value in kept.items()
        }
        saved = {key: _to_save(objective, parameter, key, found[key]) for key in found}
        _add(items, saved)
    encoded = encode(_schedule_state(objective), shared, name=f"scheduler/{objective.name}")
    rest = rest_of(objective, names, shared, name=f"{prefix}rest")
    _add(items, shared)
    return {
        "name": objective.name,
        "optimizer": kind_of(objective.optimizer),
        "schedule": kind_of_schedule(objective.scheduler),
        "groups": groups,
        "counted": counted_keys(objective),
        "state": states,
        "rest": rest,
        "scheduler": encoded,
        "scale": objective.scale.to_save(),
    }


def _add(items: dict[str, Item], more: Mapping[str, Item]) -> None:
    """Adds tensors. Raises: ConfigError if two have one name: one would be read as both."""
    for name, item in more.items():
        if name in items:
            raise ConfigError(
                f"two tensors of the optimizer would be {name} in a checkpoint: a name of a "
                "parameter and a key of its state hold a slash. Name one of them otherwise."
            )
        items[name] = item


def _schedule_state(objective: ObjectiveState) -> Any:
    """Returns a schedule's state, None without one. Raises: ConfigError if it cannot tell it."""
    scheduler = objective.scheduler
    if scheduler is None:
        return None
    if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise ConfigError(
            f"the scheduler ({type(scheduler).__name__}) has no state_dict and load_state_dict, "
            "without which no run can go on from a checkpoint. Give it both, of numbers, texts and "
            "lists of them, or take one of torch's or of ddp_kit.schedules."
        )
    return scheduler.state_dict()


def _to_save(
    objective: ObjectiveState, parameter: nn.Parameter, name: str, tensor: torch.Tensor
) -> Item:
    """Returns a tensor of a parameter's state as a checkpoint takes it.

    Raises: ConfigError if it is neither one number nor split as its parameter is: no later attempt
        could split it.
    """
    item = objective.optimizer_view.part(parameter, tensor)
    if item is None:
        raise ConfigError(
            f"the optimizer's {name} has shape {tuple(tensor.shape)} on a rank and its "
            f"parameter, of which ranks hold rows, {tuple(parameter.shape)}: only what is "
            "shaped alike can be split alike. Type --strategy zero1, or another optimizer."
        )
    return item


def allocate(
    opened: Opened,
    objective: ObjectiveState,
    saved: Mapping[str, Any],
    names: Mapping[str, nn.Parameter],
    targets: dict[str, Item],
) -> dict[str, torch.Tensor]:
    """Returns a tensor for each of an optimizer's state in a checkpoint, by the checkpoint's names.
    `targets` gets them as what is to be read into them.

    Raises: ConfigError for a state that is not shaped like its parameter, where that is split over
        the ranks.
    """
    tensors: dict[str, torch.Tensor] = {}
    # New memory takes longer to come by than its content.
    live: dict[str, Item] = {}
    objective_values(objective, {id(parameter): name for name, parameter in names.items()}, live)
    for name, kept in saved["state"].items():
        parameter = names.get(name)
        for reference in references(kept):
            item = _memory_for(reference, opened, objective, parameter, live)
            tensors[reference] = memory_of(item)
            targets[reference] = item
    return tensors


def _memory_for(
    reference: str,
    opened: Opened,
    objective: ObjectiveState,
    parameter: nn.Parameter | None,
    live: Mapping[str, Item],
) -> Item:
    """Returns the tensor that an optimizer has under that name, else a new one.

    Raises: ConfigError if it is not shaped like its parameter, where that is split over the ranks.
    """
    shape, dtype = opened.kinds[reference]
    has = live.get(reference)
    if isinstance(has, torch.Tensor) and has.shape == shape and has.dtype == dtype:
        return has
    if parameter is None:
        # Of a parameter that this model lacks: what does not fit is told together.
        return torch.empty(shape, dtype=dtype, device="cpu")
    item = objective.optimizer_view.empty(parameter, shape=shape, dtype=dtype)
    if item is None:
        raise ConfigError(
            f"{opened.folder} cannot go on with this --strategy: the optimizer's {reference} has "
            f"shape {shape}, its parameter {held(parameter).shape}, and only what is shaped alike "
            "can be split alike. Type --strategy ddp, or zero1."
        )
    return item


def restore_objective(
    objective: ObjectiveState,
    saved: Mapping[str, Any],
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    *,
    keeps_hyperparameters: bool,
) -> None:
    """Gives an optimizer its state back, from tensors that have been read. See `restore_state`."""
    optimizer = objective.optimizer
    states = {names[name]: decode(kept, tensors) for name, kept in saved["state"].items()}
    numbers = [decode(group, tensors) for group in saved["groups"]]
    if not keeps_hyperparameters:
        numbers = with_own_hyperparameters(objective, saved, numbers)
    objective.optimizer_view.restore(states)
    restore_rest(objective.optimizer_view.stepped, saved.get("rest", {}), names, tensors)
    for own, group in zip(optimizer.param_groups, numbers, strict=True):
        own.update(group)
    if objective.scheduler is not None and keeps_hyperparameters:
        objective.scheduler.load_state_dict(decode(saved["scheduler"], tensors))
    # Another precision begins with its own scale.
    if objective.scale.is_on and saved["scale"]["is_on"]:
        objective.scale.scale = saved["scale"]["scale"]
        objective.scale.good_steps = saved["scale"]["good_steps"]


def advance_schedule(objective: ObjectiveState, *, steps: int, where: str) -> None:
    """Steps the schedule that this attempt has built to where a run of these settings would have it
    by now: many of torch's compute a rate from the one before. A million steps take 3 to 6 s.

    Raises: ConfigError for one that does not go as far.
    """
    if objective.scheduler is None:
        return
    # Those steps were taken, in the attempts before.
    objective.optimizer._opt_called = True  # type: ignore[attr-defined]
    try:
        for _ in range(steps):
            objective.scheduler.step()
    except Exception as error:
        # Whatever a schedule raises: it is the user's own, or torch's.
        kind = type(objective.scheduler).__name__
        raise ConfigError(
            f"{where} is at step {steps}, and the schedule of the changed settings ({kind}) does "
            f"not go as far: {error} "
            "Type more --epochs or --max-steps, or the settings as they were."
        ) from error
