"""Which numbers of an optimizer's groups are settings, and which it counts itself.

An attempt with other settings has its own hyperparameters, and goes on with what was counted: the
step of schedule-free optimizers, the distance that Prodigy has estimated.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ddp_kit.training.optimizer_marks import text_of
from ddp_kit.training.state import ObjectiveState

# Of a parameter group: how it is computed, which is each attempt's own, not what.
KEEPS_OWN = {"params", "foreach", "fused", "capturable", "differentiable"}


def counted_keys(objective: ObjectiveState) -> list[list[str]]:
    """Returns the keys of each group that stepping has added or changed, and that are no arguments
    of the optimizer, as rates are.
    """
    arguments = _arguments_of(objective.optimizer)
    counted = []
    for group, marks in zip(objective.optimizer.param_groups, objective.marks.groups, strict=True):
        keys = []
        for key, value in group.items():
            if key in arguments or key in KEEPS_OWN:
                continue
            if isinstance(value, torch.Tensor) or text_of(value) != marks.get(key):
                keys.append(key)
        counted.append(keys)
    return counted


def with_own_hyperparameters(
    objective: ObjectiveState, saved: Mapping[str, Any], numbers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns what the groups of an attempt with other settings hold: what was counted before, and
    its own hyperparameters.

    Args: `saved` of the objective; `numbers` of its groups, decoded.
    """
    optimizer = objective.optimizer
    merged = []
    for i, group in enumerate(optimizer.param_groups):
        own = {key: value for key, value in group.items() if key not in KEEPS_OWN}
        if "counted" in saved:
            keys = set(saved["counted"][i]) - _moved(own, objective.marks.groups[i])
        else:
            # A checkpoint of before: what an optimizer adds to its arguments.
            keys = (numbers[i].keys() & optimizer.defaults.keys()) - _arguments_of(optimizer)
        merged.append(own | {key: numbers[i][key] for key in numbers[i] if key in keys})
    return merged


def _moved(group: Mapping[str, Any], marks: Mapping[str, str]) -> set[str]:
    """Returns the keys that the schedule of these settings has moved since the beginning: only it
    has been stepped.
    """
    return {key for key, value in group.items() if text_of(value) != marks.get(key)}


def _arguments_of(optimizer: Optimizer) -> set[str]:
    """Returns the names that an optimizer of that kind is built with."""
    arguments = {"lr"}
    for kind in type(optimizer).__mro__:
        if "__init__" in vars(kind):
            arguments |= set(inspect.signature(vars(kind)["__init__"]).parameters)
    return arguments
