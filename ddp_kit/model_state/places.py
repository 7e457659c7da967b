"""Where a model keeps what it is: tensors in registers of its modules, and plain attributes."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from ddp_kit.distributed.tensors_from_rank import Kind, kind_of

BUFFERS = "_buffers"
PARAMETERS = "_parameters"


@dataclass(eq=False)
class Place:
    """Where a model has a tensor: a register of a module, of buffers or of parameters."""

    name: str
    module: nn.Module
    attribute: str
    register: str = BUFFERS

    @property
    def tensor(self) -> torch.Tensor | None:
        """What is there now."""
        found: torch.Tensor | None = getattr(self.module, self.register).get(self.attribute)
        return found

    def put(self, tensor: torch.Tensor | None) -> None:
        """Puts a tensor there."""
        getattr(self.module, self.register)[self.attribute] = tensor

    @property
    def is_there(self) -> bool:
        """Whether the register has an entry, be it None."""
        return self.attribute in getattr(self.module, self.register)

    def remove(self) -> None:
        """Takes the entry out of the register."""
        getattr(self.module, self.register).pop(self.attribute, None)

    @property
    def is_persistent(self) -> bool:
        """Whether state dicts have it."""
        return self.attribute not in self.module._non_persistent_buffers_set


def places_of(model: nn.Module) -> list[Place]:
    """Returns every place of a model, those too where there is nothing yet."""
    found = []
    for prefix, module in model.named_modules():
        for register in (BUFFERS, PARAMETERS):
            for attribute in getattr(module, register):
                name = f"{prefix}.{attribute}".lstrip(".")
                found.append(Place(name, module, attribute, register))
    return found


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """Returns shape and dtype of each buffer, None for those that are empty, by name."""
    places = places_of(model)
    return {place.name: kind_of(place.tensor) for place in places if place.register == BUFFERS}


def is_same_memory(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    """Whether a tensor is still what `memory` was detached from: no `.data =`, no `resize_`."""
    return tensor.data_ptr() == memory.data_ptr() and tensor.shape == memory.shape


@dataclass
class Attribute:
    """A plain attribute of a module: anything that is in no register."""

    name: str
    module: nn.Module
    key: str

    @property
    def value(self) -> Any:
        """What it is now, None where it is not there."""
        return vars(self.module).get(self.key)

    @property
    def is_told(self) -> bool:
        """Whether its module says itself what its state is, which checkpoints then hold."""
        return type(self.module).get_extra_state is not nn.Module.get_extra_state


def attribute_names(model: nn.Module) -> set[str]:
    """Returns the names of all attributes."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        found.update(f"{prefix}.{key}".lstrip(".") for key in own_keys(module))
    return found


def own_keys(module: nn.Module) -> list[str]:
    """Returns the attributes of a module that no other module has."""
    torchs = _of_any_module()
    return [key for key in vars(module) if key not in torchs]


@cache
def _of_any_module() -> frozenset[str]:
    return frozenset(vars(nn.Module())) | {"_compiled_call_impl", "forward"}
