"""What an optimizer keeps beside its groups and the state of its parameters.

That is state under names, attributes that a step changes, optimizers that it wraps, and what its
own `state_dict` says. A run that goes on without it would be another run, and nothing would tell:
it is saved if it is tensors and plain data, and refused by name if it is not.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.checkpoint.format.encoding import encode
from ddp_kit.errors import ConfigError, some
from ddp_kit.strategies.optimizer_view import kept_states
from ddp_kit.training.optimizer_marks import (
    Marks,
    attribute_texts,
    inner_optimizers,
    own_attributes,
    tensors_in,
)
from ddp_kit.training.state import ObjectiveState


def has_own_state_dict(optimizer: Optimizer) -> bool:
    """Whether an optimizer says itself, in both directions, what its state is."""
    kind = type(optimizer)
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)
    gives = kind.state_dict is not Optimizer.state_dict
    takes = kind.load_state_dict is not Optimizer.load_state_dict
    return bool(hooks) or (gives and takes)


class Rest:
    """It is gathered from one optimizer, and those that it wraps, into JSON values and tensors."""

    def __init__(
        self, model: nn.Module, names: Mapping[int, str], tensors: dict[str, torch.Tensor]
    ):
        """Args: `names` of the model's parameters by their `id`; `tensors` gets those found."""
        self._of_model = {_address(tensor) for tensor in tensors_in(model)}
        self._names = names
        self._tensors = tensors

    def of(self, optimizer: Optimizer, marks: Marks, *, name: str) -> dict[str, Any]:
        """Returns an optimizer's values by kind, without kinds that there are none of.

        Args: `marks` of it from before its first step; `name` for it in the file.
        Raises: ConfigError for what a checkpoint cannot hold.
        """
        values: dict[str, Any] = {"attributes": self._attributes(optimizer, marks, name=name)}
        if has_own_state_dict(optimizer):
            values["own"] = self._own(optimizer, name=f"{name}.state_dict")
        else:
            values["named"] = self._named(optimizer, name=f"{name}.state")
            inner = {}
            for path, each in inner_optimizers(optimizer).items():
                each_marks = marks.inner.get(path, Marks())
                inner[path] = self._inner(optimizer, each, each_marks, name=f"{name}.{path}")
            values["inner"] = {path: found for path, found in inner.items() if found}
        return {kind: value for kind, value in values.items() if value}

    def _encoded(self, value: Any, *, name: str) -> Any:
        return encode(value, self._tensors, name=name)

    def _own(self, optimizer: Optimizer, *, name: str) -> Any:
        """Returns what its own state_dict says."""
        kind = type(optimizer).__name__
        content = optimizer.state_dict()
        if _keys_in(content) & self._names.keys():
            raise ConfigError(
                f"the state_dict of {kind} names parameters by their id(), which is another one in "
                "the next process. Number them there, as torch's optimizers do."
            )
        given = tensors_in(content)
        addresses = {_address(tensor) for tensor in given}
        left_out = []
        for where, tensor in self._tensors_of(optimizer):
            if _address(tensor) not in addresses and not _is_one_of(tensor, given):
                left_out.append(where)
        if left_out:
            raise ConfigError(
                f"the state_dict of {kind} leaves out {some(left_out)}: a run that goes on would "
                "go on without. Put it in, and take it back in load_state_dict."
            )
        return self._encoded(content, name=name)

    def _tensors_of(self, optimizer: Optimizer) -> list[tuple[str, torch.Tensor]]:
        """Returns the tensors that an optimizer keeps, with where it does."""
        found = []
        for key, state in optimizer.state.items():
            owner = self._names.get(id(key), str(key)[:40])
            found += [(f"the state of {owner}", tensor) for tensor in tensors_in(state)]
        known = self._addresses_of_parameters(optimizer)
        for name, value in own_attributes(optimizer).items():
            for tensor in tensors_in(value):
                if _address(tensor) not in known:
                    found.append((name, tensor))
        for name, inner in inner_optimizers(optimizer).items():
            found += [(f"{where} in {name}", tensor) for where, tensor in self._tensors_of(inner)]
        return found

    def _addresses_of_parameters(self, optimizer: Optimizer) -> set[int]:
        """Returns those of the model's tensors too."""
        found = set(self._of_model)
        for group in optimizer.param_groups:
            found |= {_address(parameter) for parameter in group["params"]}
        return found

    def _named(self, optimizer: Optimizer, *, name: str) -> dict[str, Any]:
        """Returns the state that is no parameter's."""
        values = {}
        state: Mapping[Any, Any] = optimizer.state
        for key, value in state.items():
            if isinstance(key, torch.Tensor):
                continue
            if not isinstance(key, str):
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps state under {key!r}, a "
                    f"{type(key).__name__}: a checkpoint takes it under a text, or under the "
                    "parameter that it is of."
                )
            values[key] = self._encoded(value, name=f"{name}.{key}")
        return values

    def _attributes(self, optimizer: Optimizer, marks: Marks, *, name: str) -> dict[str, Any]:
        """Returns the attributes that a step has changed, and those that hold tensors."""
        known = self._addresses_of_parameters(optimizer)
        known |= {_address(tensor) for tensor in tensors_in(list(optimizer.state.values()))}
        texts = attribute_texts(optimizer)
        values = {}
        for key, value in own_attributes(optimizer).items():
            addresses = {_address(tensor) for tensor in tensors_in(value)}
            is_changed = texts[key] != marks.attributes.get(key)
            if not addresses and is_changed:
                values[key] = self._encoded(value, name=f"{name}.{key}")
            elif addresses - known:
                # What has a state_dict of its own was compared with that.
                if not has_own_state_dict(optimizer):
                    values[key] = self._encoded(value, name=f"{name}.{key}")
            elif addresses and is_changed:
                raise ConfigError(
                    f"a step of {type(optimizer).__name__} changes its {key}, which holds "
                    "parameters or their state beside what has changed: a checkpoint takes numbers "
                    "and texts by themselves."
                )
        return values

    def _inner(
        self, outer: Optimizer, inner: Optimizer, marks: Marks, *, name: str
    ) -> dict[str, Any]:
        """Returns the values of an optimizer that another one wraps."""
        values = self.of(inner, marks, name=name)
        if has_own_state_dict(inner):
            return values
        if inner.state is not outer.state:
            states = {}
            for parameter, state in kept_states(inner):
                own = self._names[id(parameter)]
                states[own] = self._encoded(dict(state), name=f"{name}.state/{own}")
            values["state"] = states
        if inner.param_groups is not outer.param_groups:
            groups = []
            for i, group in enumerate(inner.param_groups):
                numbers = {key: value for key, value in group.items() if key != "params"}
                groups.append(self._encoded(numbers, name=f"{name}.group.{i}"))
            values["groups"] = groups
        return values


def rest_of(
    objective: ObjectiveState,
    names: Mapping[int, str],
    tensors: dict[str, torch.Tensor],
    *,
    name: str,
) -> dict[str, Any]:
    """Returns what the optimizer that steps keeps beside its groups and its parameters' state, as
    JSON values, {} if that is nothing. Its tensors go into `tensors`.

    Raises: ConfigError for what a checkpoint cannot hold, and where ranks step different
        parameters, for what may not be the same on all of them.
    """
    view = objective.optimizer_view
    optimizer = view.stepped
    found: dict[str, torch.Tensor] = {}
    values = Rest(objective.model, names, found).of(optimizer, objective.marks, name=name)
    if not view.has_whole and (found or values.keys() - {"attributes"}):
        kinds = {
            "attributes": "tensors as attributes",
            "own": "a state_dict of its own",
            "named": "state under names",
            "inner": "the state of another optimizer, which it wraps",
        }
        raise ConfigError(
            f"{type(optimizer).__name__} keeps {some([kinds[kind] for kind in values])}, and with "
            "this --strategy a rank steps a part of the weights: what is there on one rank is not "
            "what is there on another. Type --strategy ddp."
        )
    if found:
        values["on_device"] = [key for key, each in found.items() if each.device.type != "cpu"]
    tensors |= found
    return values


def _address(tensor: torch.Tensor) -> int:
    """Returns by what a tensor is told from others: where its content is."""
    if hasattr(tensor, "to_local") or tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr() or id(tensor)


def _is_one_of(tensor: torch.Tensor, others: Collection[torch.Tensor]) -> bool:
    """Whether one of the others has the same content."""
    for other in others:
        is_alike = other.shape == tensor.shape and other.dtype == tensor.dtype
        if is_alike and torch.equal(other.to(tensor.device), tensor):
            return True
    return False


def _keys_in(value: Any) -> set[Any]:
    """Returns the keys of all dicts in a value of containers."""
    if isinstance(value, Mapping):
        found = set(value)
        for item in value.values():
            found |= _keys_in(item)
        return found
    found = set()
    if isinstance(value, list | tuple):
        for item in value:
            found |= _keys_in(item)
    return found
