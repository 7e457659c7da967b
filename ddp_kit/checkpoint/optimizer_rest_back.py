"""Giving an optimizer back what it keeps beside its groups and its parameters' state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.checkpoint.format.encoding import decode
from ddp_kit.errors import ConfigError
from ddp_kit.strategies.optimizer_view import replace_states
from ddp_kit.training.optimizer_marks import inner_optimizers
from ddp_kit.training.state import ObjectiveState

Tensors = Mapping[str, torch.Tensor]


def require_restorable(objective: ObjectiveState, rest: Mapping[str, Any], *, where: str) -> None:
    """Raises: ConfigError if an optimizer's rest cannot be given back to the one that is here."""
    optimizer = objective.optimizer
    needs_whole = rest.keys() - {"attributes"}
    if needs_whole and not objective.optimizer_view.has_whole:
        raise ConfigError(
            f"{where} cannot go on with this --strategy: {type(optimizer).__name__} keeps more "
            "than the state of its parameters, and a rank would step a part of them. "
            "Type --strategy ddp."
        )


def restore_rest(
    optimizer: Optimizer,
    rest: Mapping[str, Any],
    names: Mapping[str, nn.Parameter],
    tensors: Tensors,
) -> None:
    """Gives an optimizer its rest back, once it has its parameters' state.

    Args: `rest` as `rest_of` returned it; `names` of the model's parameters; `tensors` that have
        been read, on the CPU.
    """
    placed = dict(tensors)
    for name in rest.get("on_device", ()):
        # Only where each rank has whole parameters is there such a tensor.
        placed[name] = tensors[name].to(optimizer.param_groups[0]["params"][0].device)
    _restore(optimizer, rest, names, placed)


def _restore(
    optimizer: Optimizer,
    rest: Mapping[str, Any],
    names: Mapping[str, nn.Parameter],
    tensors: Tensors,
) -> None:
    if "own" in rest:
        optimizer.load_state_dict(decode(rest["own"], tensors))
    for key, value in rest.get("named", {}).items():
        optimizer.state[key] = decode(value, tensors)
    inner = inner_optimizers(optimizer)
    for path, values in rest.get("inner", {}).items():
        _restore_inner(inner[path], values, names, tensors)
    for key, value in rest.get("attributes", {}).items():
        new = decode(value, tensors)
        setattr(optimizer, key, _in_place(getattr(optimizer, key, None), new))


def _restore_inner(
    optimizer: Optimizer,
    values: Mapping[str, Any],
    names: Mapping[str, nn.Parameter],
    tensors: Tensors,
) -> None:
    """Gives an optimizer that another one wraps its own back."""
    if "state" in values:
        states = {names[name]: decode(state, tensors) for name, state in values["state"].items()}
        replace_states(optimizer, states)
    for own, group in zip(optimizer.param_groups, values.get("groups", ()), strict=False):
        own.update(decode(group, tensors))
    _restore(optimizer, values, names, tensors)


@torch.no_grad()
def _in_place(old: Any, new: Any) -> Any:
    """Returns the new value, in the old one's memory where that is of the same form: others may
    hold it too.
    """
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.shape == new.shape and old.dtype == new.dtype:
            old.copy_(new)
            return old
        return new
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old[:] = [_in_place(a, b) for a, b in zip(old, new, strict=True)]
        return old
    if isinstance(old, dict) and isinstance(new, dict):
        both = {key: _in_place(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(both)
        return old
    return new
