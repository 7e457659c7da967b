"""The optimizer's part of a run's state: what it keeps of each parameter, its numbers and its
schedule, by parameter name, so that another world size or strategy can read it.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.checkpoint.format.encoding import decode, encode, references
from ddp_kit.checkpoint.format.opened import Item, Opened
from ddp_kit.distributed.local_shard import held, is_split
from ddp_kit.errors import ConfigError
from ddp_kit.training.state import ObjectiveState

# Of a parameter group: how it is computed, which is each attempt's own, not what.
KEEPS_OWN = {"params", "foreach", "fused", "capturable", "differentiable"}


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
    for parameter, kept in _state_by_parameter(objective):
        name = names[id(parameter)]
        found: dict[str, torch.Tensor] = {}
        states[name] = {
            key: encode(value, found, name=f"{prefix}{name}/{key}") for key, value in kept.items()
        }
        items |= _items_to_save(objective, parameter, found)
    schedule = None
    if objective.scheduler is not None:
        schedule = objective.scheduler.state_dict()
    encoded = encode(schedule, shared, name=f"scheduler/{objective.name}")
    items |= shared
    return {
        "name": objective.name,
        "groups": groups,
        "state": states,
        "scheduler": encoded,
        "scale": asdict(objective.scale),
    }


def _state_by_parameter(
    objective: ObjectiveState,
) -> Iterator[tuple[nn.Parameter, Mapping[str, Any]]]:
    """Yields the optimizer's state by parameter, where there is some."""
    if objective.moments is not None:
        for parameter, kept in objective.moments.items():
            if kept:
                yield parameter, kept
        return
    states = objective.optimizer.state
    for group in objective.optimizer.param_groups:
        for parameter in group["params"]:
            if states.get(parameter):
                yield parameter, states[parameter]


def _items_to_save(
    objective: ObjectiveState, parameter: nn.Parameter, found: Mapping[str, torch.Tensor]
) -> Mapping[str, Item]:
    """Returns the tensors that were found in a parameter's state as a checkpoint takes them.

    Raises: ConfigError for one that cannot be split as its parameter is.
    """
    if objective.moments is not None:
        moments = objective.moments
        return {name: moments.part(parameter, tensor) for name, tensor in found.items()}
    if is_split(parameter):
        _require_alike(parameter, found)
    if objective.owns is not None:
        return {name: held(tensor) for name, tensor in found.items()}
    return found


def _require_alike(parameter: nn.Parameter, found: Mapping[str, torch.Tensor]) -> None:
    """Raises: ConfigError for state that is neither one number nor split as its parameter is: no
    later attempt could split it.
    """
    for name, tensor in found.items():
        is_alike = is_split(tensor) and tensor.shape == parameter.shape
        if tensor.dim() and not is_alike:
            raise ConfigError(
                f"the optimizer's {name} has shape {tuple(tensor.shape)} on a rank and its "
                f"parameter, of which ranks hold rows, {tuple(parameter.shape)}: only what is "
                "shaped alike can be split alike. Type --strategy zero1, or another optimizer."
            )


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
            tensor = _tensor_for(reference, opened, objective, parameter, live)
            tensors[reference] = tensor
            if parameter is not None and _is_partitioned(opened, reference, objective, parameter):
                assert objective.moments is not None
                targets[reference] = objective.moments.part(parameter, tensor)
            else:
                targets[reference] = tensor
    return tensors


def _tensor_for(
    reference: str,
    opened: Opened,
    objective: ObjectiveState,
    parameter: nn.Parameter | None,
    live: Mapping[str, Item],
) -> torch.Tensor:
    """Returns the tensor that an optimizer has under that name, else a new one where torch would
    have it: like the parameter, a scalar on the CPU; without memory for what other ranks keep.

    Raises: ConfigError if it is not shaped like its parameter, where that is split over the ranks.
    """
    shape, dtype = opened.kinds[reference]
    if parameter is not None and _is_kept_elsewhere(objective, parameter):
        return torch.empty(shape, dtype=dtype, device="meta")
    if parameter is not None and _is_partitioned(opened, reference, objective, parameter):
        assert objective.moments is not None
        return objective.moments.empty(parameter, dtype=dtype)
    has = live.get(reference)
    if isinstance(has, torch.Tensor) and has.shape == shape and has.dtype == dtype:
        return has
    if parameter is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    whole_shape = held(parameter).shape
    is_in_parts = is_split(parameter) or objective.moments is not None
    if is_in_parts and shape and shape != whole_shape:
        raise ConfigError(
            f"{opened.folder} cannot go on with this --strategy: the optimizer's {reference} has "
            f"shape {shape}, its parameter {whole_shape}, and only what is shaped alike can be "
            "split alike. Type --strategy ddp, or zero1."
        )
    if parameter.shape == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if shape or _steps_on_device(objective.optimizer):
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    return torch.empty(shape, dtype=dtype, device="cpu")


def _is_kept_elsewhere(objective: ObjectiveState, parameter: nn.Parameter) -> bool:
    """Whether another rank alone keeps the optimizer's state of a parameter."""
    return objective.owns is not None and not objective.owns(parameter)


def _is_partitioned(
    opened: Opened, reference: str, objective: ObjectiveState, parameter: nn.Parameter
) -> bool:
    """Whether a tensor of the optimizer's state is in the partitions that it steps."""
    if objective.moments is None or _is_kept_elsewhere(objective, parameter):
        return False
    shape, _ = opened.kinds[reference]
    return shape == held(parameter).shape


def _steps_on_device(optimizer: Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


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
    optimizer.state.clear()
    for name, kept in saved["state"].items():
        parameter = names[name]
        if _is_kept_elsewhere(objective, parameter):
            continue
        if objective.moments is not None:
            objective.moments.restore(parameter, decode(kept, tensors))
        else:
            optimizer.state[parameter] = decode(kept, tensors)
    if objective.refresh is not None:
        objective.refresh()
    for own, group in zip(optimizer.param_groups, saved["groups"], strict=True):
        numbers = decode(group, tensors)
        if not keeps_hyperparameters:
            numbers = _counted(optimizer, numbers)
        own.update(numbers)
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


def _counted(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an optimizer itself counts in a group, as schedule-free ones do: what it adds to
    the arguments it is built with.
    """
    arguments = {"lr"}
    for kind in type(optimizer).__mro__:
        if "__init__" in vars(kind):
            arguments |= set(inspect.signature(vars(kind)["__init__"]).parameters)
    return {
        key: value
        for key, value in group.items()
        if key in optimizer.defaults and key not in arguments
    }
