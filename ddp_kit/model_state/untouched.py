"""What a model is at one moment, what has changed of it since, and putting all of it back.

Passes that are none of training's leave no trace by it: buffers and parameters, registered anew or
assigned to, plain attributes of modules, generators that they hold.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ddp_kit.data.seeding import generators_put_back
from ddp_kit.distributed.local_shard import is_split
from ddp_kit.distributed.tensors_from_rank import kind_of
from ddp_kit.model_state.images import Image, image_of, same_bits
from ddp_kit.model_state.places import (
    BUFFERS,
    PARAMETERS,
    Attribute,
    Place,
    is_same_memory,
    own_keys,
    places_of,
)


@dataclass
class Changes:
    """What is no longer as it was."""

    places: list[Place] = field(default_factory=list)
    # Names of those places that have another shape, or were empty or not there.
    reshaped: set[str] = field(default_factory=set)
    # Numbers, texts and containers of them.
    plain: list[Attribute] = field(default_factory=list)
    # Tensors and other objects.
    other: list[Attribute] = field(default_factory=list)
    generators: list[Attribute] = field(default_factory=list)
    # Names of modules and parameters that there were not, or are others now.
    built: list[str] = field(default_factory=list)

    def untold(self) -> "Changes":
        """Returns it without attributes of modules that have `get_extra_state`: they are the
        module's own, as in bare torch."""
        return replace(
            self,
            plain=[attribute for attribute in self.plain if not attribute.is_told],
            other=[attribute for attribute in self.other if not attribute.is_told],
        )


@dataclass
class _Noted:
    """A tensor as it was: the object, the memory it had, and the values in it."""

    place: Place
    tensor: torch.Tensor | None
    memory: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def is_here(self) -> bool:
        """Whether nothing has changed."""
        if self.place.tensor is not self.tensor:
            return False
        if self.tensor is None or self.memory is None or self.values is None:
            return True
        if not is_same_memory(self.tensor, self.memory):
            return False
        return same_bits(self.memory, self.values)

    @torch.no_grad()
    def put_back(self) -> None:
        """Puts object, memory and values back."""
        if self.place.tensor is not self.tensor:
            self.place.put(self.tensor)
        if self.tensor is None or self.memory is None or self.values is None:
            return
        if not is_same_memory(self.tensor, self.memory):
            self.tensor.data = self.memory
        if not same_bits(self.memory, self.values):
            self.memory.copy_(self.values)


class Snapshot:
    """A model as it was when this was made."""

    def __init__(
        self,
        model: nn.Module,
        *,
        has: Callable[[Place], bool] = lambda place: True,
        has_attribute: Callable[[str], bool] = lambda name: True,
        has_modes: bool = True,
    ):
        """Args: `has` which places are noted; parts of tensors never are; `has_attribute` which
        attributes are, by name; `has_modes` whether modules' training mode is. Values of parameters
        are kept in host memory.
        """
        self._model = model
        self._has = has
        self._has_attribute = has_attribute
        self._noted = [_note(place) for place in places_of(model) if has(place)]
        # Of each module, by its identity.
        self._known: dict[int, set[str]] = {}
        self._passing: dict[int, set[str]] = {}
        self._images: dict[int, dict[str, Image]] = {}
        self._children: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        for prefix, module in model.named_modules():
            self._known[id(module)] = {*module._buffers, *module._parameters}
            self._passing[id(module)] = set(module._non_persistent_buffers_set)
            images = {}
            for attribute in self._attributes_of(prefix, module):
                images[attribute.key] = image_of(attribute.value)
            self._images[id(module)] = images
            self._children.append((module, dict(module._modules)))
            if has_modes:
                self._modes.append((module, module.training))

    def changes(self) -> Changes:
        """Returns what is no longer as it was."""
        found = Changes()
        for noted in self._noted:
            if not noted.is_here():
                found.places.append(noted.place)
                if kind_of(noted.place.tensor) != kind_of(noted.values):
                    found.reshaped.add(noted.place.name)
                if _is_replaced(noted):
                    found.built.append(noted.place.name)
        for place in self._new_places():
            if place.register == BUFFERS:
                found.places.append(place)
                found.reshaped.add(place.name)
            else:
                found.built.append(place.name)
        names = {}
        for prefix, module in self._model.named_modules():
            names[id(module)] = prefix
            self._compare_attributes(prefix, module, found)
        for module, children in self._children:
            for key, child in module._modules.items():
                if child is not children.get(key):
                    found.built.append(f"{names.get(id(module), '')}.{key}".lstrip("."))
        return found

    def _new_places(self) -> list[Place]:
        found = []
        for place in places_of(self._model):
            known = self._known.get(id(place.module))
            if known is not None and place.attribute not in known and self._has(place):
                found.append(place)
        return found

    def _attributes_of(self, prefix: str, module: nn.Module) -> list[Attribute]:
        """Returns those attributes of a module that are noted."""
        found = []
        for key in own_keys(module):
            name = f"{prefix}.{key}".lstrip(".")
            if self._has_attribute(name):
                found.append(Attribute(name, module, key))
        return found

    def _compare_attributes(self, prefix: str, module: nn.Module, found: Changes) -> None:
        images = self._images.get(id(module))
        if images is None:
            return
        for attribute in self._attributes_of(prefix, module):
            image = images.get(attribute.key)
            if image is not None and image.shows(attribute.value):
                continue
            is_plain = image_of(attribute.value).is_plain
            if image is not None and image.is_generator:
                found.generators.append(attribute)
            elif is_plain and (image is None or image.is_plain):
                found.plain.append(attribute)
            else:
                found.other.append(attribute)

    def put_back(self, *, attributes: Callable[[str], bool] = lambda name: True) -> None:
        """Puts everything back; of attributes those whose names are wanted."""
        for module, children in self._children:
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
            module._non_persistent_buffers_set &= self._passing[id(module)]
        for place in self._new_places():
            del getattr(place.module, place.register)[place.attribute]
        for noted in self._noted:
            noted.put_back()
        for module, mode in self._modes:
            module.training = mode
        self.put_attributes_back(attributes)

    def put_attributes_back(self, wanted: Callable[[str], bool]) -> None:
        """Puts those attributes back whose names are wanted."""
        for prefix, module in self._model.named_modules():
            images = self._images[id(module)]
            for attribute in self._attributes_of(prefix, module):
                if not wanted(attribute.name):
                    continue
                if attribute.key in images:
                    vars(module)[attribute.key] = images[attribute.key].put_back()
                else:
                    del vars(module)[attribute.key]
            for key, image in images.items():
                # One that was deleted.
                if key not in vars(module) and wanted(f"{prefix}.{key}".lstrip(".")):
                    vars(module)[key] = image.put_back()


def _note(place: Place) -> _Noted:
    tensor = place.tensor
    if tensor is None or tensor.is_meta or is_split(tensor):
        return _Noted(place, tensor)
    memory = tensor.detach()
    if place.register == PARAMETERS and memory.device.type != "cpu":
        return _Noted(place, tensor, memory, memory.to("cpu"))
    return _Noted(place, tensor, memory, memory.clone())


def _is_replaced(noted: _Noted) -> bool:
    return noted.place.register == PARAMETERS and noted.place.tensor is not noted.tensor


@contextmanager
def untouched(
    model: nn.Module,
    *,
    weights: bool = True,
    has_attribute: Callable[[str], bool] = lambda name: True,
) -> Iterator[Snapshot]:
    """Puts a model and the default generators back at the end. Yields the model as it was.

    Args: `weights` False leaves parameters out; `has_attribute` says which attributes are put back.
    """
    snapshot = Snapshot(
        model,
        has=lambda place: weights or place.register == BUFFERS,
        has_attribute=has_attribute,
    )
    with generators_put_back():
        try:
            yield snapshot
        finally:
            snapshot.put_back()
