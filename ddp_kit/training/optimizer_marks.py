"""What an optimizer has before its first step, as texts, by which one sees later what it keeps.

Many keep numbers where torch's own keep none: as attributes, or in their groups. What a step has
changed is state, and the rest is how the optimizer was built.
"""

import collections
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

DEEPEST = 8  # objects in objects that are looked into
CONTAINERS = (list, tuple, set, frozenset, collections.deque)
# Objects in which numbers change that are no state of an optimizer.
TOOLS = (ModuleType, logging.Logger, nn.Module)
# Attributes that are set from outside: by schedulers, by fused kernels and by our step.
SET_FROM_OUTSIDE = {
    "step",
    "found_inf",
    "grad_scale",
    "_opt_called",
    "_step_supports_amp_scaling",
    # Of torch's own first step, which a rank without parameters of its own does not take.
    "_need_device_dtype_check_for_fused",
}


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Texts of an optimizer's attributes and of its groups' values, and those of the optimizers
    that it wraps, by their names."""

    attributes: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[Mapping[str, str], ...] = ()
    inner: "Mapping[str, Marks]" = field(default_factory=dict)


def marks_of(optimizer: Optimizer) -> Marks:
    """Returns what an optimizer has now."""
    return Marks(
        attributes=attribute_texts(optimizer),
        groups=tuple(_group_texts(group) for group in optimizer.param_groups),
        inner={name: marks_of(inner) for name, inner in inner_optimizers(optimizer).items()},
    )


def _group_texts(group: Mapping[str, Any]) -> dict[str, str]:
    return {key: text_of(value) for key, value in group.items() if key != "params"}


def attribute_texts(optimizer: Optimizer) -> dict[str, str]:
    """Returns a text of each of an optimizer's `own_attributes`, whatever is in its groups and in
    its parameters' state."""
    elsewhere = {id(part) for part in (*optimizer.param_groups, *optimizer.state.values())}
    return {
        name: text_of(value, elsewhere=elsewhere)
        for name, value in own_attributes(optimizer).items()
    }


def own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the attributes of an optimizer that torch's base class does not have, without those
    that are optimizers, or groups and state under another name."""
    every = (optimizer, *inner_optimizers(optimizer).values())
    elsewhere: set[int] = set()
    for each in every:
        elsewhere |= {id(each.state), id(each.param_groups)}
    return {
        name: value
        for name, value in _further(optimizer).items()
        if id(value) not in elsewhere and not dict(_optimizers_in(value))
    }


def inner_optimizers(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Returns the optimizers that an optimizer wraps, by attribute."""
    found = {}
    for name, value in _further(optimizer).items():
        for path, inner in _optimizers_in(value):
            if inner is not optimizer:
                found[f"{name}{path}"] = inner
    return found


def _further(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the attributes that torch's base class does not have."""
    base = vars(Optimizer([nn.Parameter(torch.empty(0))], {})).keys() | SET_FROM_OUTSIDE
    return {name: value for name, value in vars(optimizer).items() if name not in base}


def _optimizers_in(value: Any) -> Iterator[tuple[str, Optimizer]]:
    items: list[tuple[str, Any]] = [("", value)]
    if isinstance(value, list | tuple):
        items = [(f".{i}", item) for i, item in enumerate(value)]
    elif isinstance(value, Mapping):
        items = [(f".{key}", item) for key, item in value.items()]
    for path, item in items:
        if isinstance(item, Optimizer):
            yield path, item


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Returns the tensors in a value, in containers, modules and objects too."""
    found: list[torch.Tensor] = []
    _collect(value, found, set(), DEEPEST)
    return found


def _collect(value: Any, found: list[torch.Tensor], seen: set[int], depth: int) -> None:
    if id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found.append(value)
        return
    for item in _parts_of(value):
        _collect(item, found, seen, depth - 1)


def _parts_of(value: Any) -> list[Any]:
    """Returns what a value holds."""
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, CONTAINERS):
        return list(value)
    if callable(value) or isinstance(value, TOOLS):
        return []
    return list(getattr(value, "__dict__", {}).values())


def text_of(value: Any, *, elsewhere: Collection[int] = (), depth: int = DEEPEST) -> str:
    """Returns a text that is another one once a value has changed.

    What is in a tensor, a module or a function does not count, nor in objects whose `id` is in
    `elsewhere`.
    """
    kind = type(value).__name__
    if id(value) in elsewhere or isinstance(value, torch.Tensor) or depth == 0:
        return kind
    if isinstance(value, TOOLS) or callable(value):
        return f"{kind} {id(value)}"

    def inside(parts: Collection[Any]) -> list[str]:
        return [text_of(part, elsewhere=elsewhere, depth=depth - 1) for part in parts]

    drawn = _state_of_generator(value)
    if drawn is not None:
        return f"{kind} {drawn}"
    if isinstance(value, Mapping):
        return f"{kind} {inside(value.keys())} {inside(value.values())}"
    if isinstance(value, set | frozenset):
        return f"{kind} {sorted(inside(value))}"
    if isinstance(value, CONTAINERS):
        return f"{kind} {inside(value)}"
    if getattr(value, "__dict__", None):
        return f"{kind} {inside(vars(value).values())}"
    return repr(value)


def _state_of_generator(value: Any) -> str | None:
    """Returns the state of a generator of random numbers, None for anything else."""
    if isinstance(value, torch.Generator):
        return str(value.get_state().tolist())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False))
    if isinstance(value, np.ndarray):
        return str(value.tobytes())
    # Python's own.
    get_state = getattr(value, "getstate", None)
    return None if get_state is None else str(get_state())
