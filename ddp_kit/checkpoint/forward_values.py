"""What forward passes change of a model, in a checkpoint: plain attributes, each micro-batch's own
values, and buffers that need not have the shape that a new model has.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ddp_kit.checkpoint.format.fit import Kind
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.distributed.local_shard import Held, Item
from ddp_kit.errors import ConfigError
from ddp_kit.model_state.attributes import put_saved
from ddp_kit.model_state.places import BUFFERS, Place, places_of
from ddp_kit.model_state.untouched import Snapshot
from ddp_kit.training.state import Training

OWN = "own/"


def forward_values(training: Training) -> dict[str, Any]:
    """Returns what state.json holds of it: nothing for a model of which a pass changes nothing."""
    state = training.forward_state
    passing = []
    for place in places_of(training.model):
        is_buffer = place.register == BUFFERS and place.tensor is not None
        if is_buffer and not place.is_persistent:
            passing.append(place.name)
    values = {
        "attributes": state.attributes.saved(),
        "reshaped": state.reshaped_by_now(),
        "non_persistent": passing,
    }
    return {name: value for name, value in values.items() if value}


def own_items(training: Training) -> dict[str, Item]:
    """Returns each micro-batch's own values: one row for each of the global batch, of which this
    rank has those that it runs.
    """
    own = training.forward_state.own
    if own is None:
        return {}
    items: dict[str, Item] = {}
    for name, rows in own.stacked().items():
        shape = (own.count, *rows.shape[1:])
        items[f"{OWN}{name}"] = Held(rows, own.slots.start, shape)
    return items


@dataclass
class Reshaped:
    """Buffers of a checkpoint that a new model has otherwise, or not at all."""

    # New memory for them, by name, and whether state dicts have them.
    tensors: dict[str, tuple[torch.Tensor, bool]] = field(default_factory=dict)
    # Names of what the checkpoint has and is not read.
    left_out: set[str] = field(default_factory=set)

    def put(self, model: nn.Module) -> None:
        """Gives them to the model."""
        for name, (tensor, is_persistent) in self.tensors.items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            if attribute in module._buffers:
                module._buffers[attribute] = tensor
            else:
                module.register_buffer(attribute, tensor, persistent=is_persistent)


def take_passing(opened: Opened, training: Training, targets: dict[str, Item]) -> Reshaped:
    """Takes out of `targets` what need not fit, and puts in new memory for what the run has
    reshaped. Returns the latter, and what is not read at all.

    A buffer that state dicts leave out is read if it fits.
    """
    found = Reshaped()
    live = {place.name: place for place in places_of(training.model)}
    device = training.group.device
    saved: Mapping[str, bool] = opened.values.get("reshaped", {})
    for name, is_persistent in saved.items():
        stored = f"model/{name}"
        shape, dtype = opened.kinds[stored]
        if _fits(stored, opened.kinds, targets):
            continue
        _require_module(training.model, name, opened)
        tensor = torch.empty(shape, dtype=dtype, device=device)
        found.tensors[name] = (tensor, is_persistent)
        targets[stored] = tensor
    passing = set(opened.values.get("non_persistent", []))
    passing |= {name for name, place in live.items() if _is_passing(place)}
    for name in passing:
        for stored in (f"model/{name}", f"ema/{name}"):
            if not _fits(stored, opened.kinds, targets):
                targets.pop(stored, None)
                found.left_out.add(stored)
    _take_own(opened, targets)
    return found


def _is_passing(place: Place) -> bool:
    return place.register == BUFFERS and not place.is_persistent


def _fits(stored: str, kinds: Mapping[str, Kind], targets: Mapping[str, Item]) -> bool:
    item = targets.get(stored)
    if not isinstance(item, torch.Tensor):
        return False
    return kinds.get(stored) == (tuple(item.shape), item.dtype)


def _require_module(model: nn.Module, name: str, opened: Opened) -> None:
    try:
        model.get_submodule(name.rpartition(".")[0])
    except AttributeError as error:
        raise ConfigError(f"{opened.folder} does not fit: the model has no {name}.") from error


def _take_own(opened: Opened, targets: dict[str, Item]) -> None:
    """Makes memory of the shape that the checkpoint has for each micro-batch's own values.

    Raises: ConfigError if it has another number of them.
    """
    for stored, item in list(targets.items()):
        if not stored.startswith(OWN) or stored not in opened.kinds:
            continue
        assert isinstance(item, Held)
        (count, *shape), dtype = opened.kinds[stored]
        if count != item.shape[0]:
            raise ConfigError(
                f"{opened.folder} has {stored.removeprefix(OWN)} of {count} micro-batches in a "
                f"global batch, each its own, and there are {item.shape[0]} now. State the "
                "--micro-batch that it was saved with, and start a number of ranks up to "
                f"{count}."
            )
        rows = item.rows.new_empty((len(item.rows), *shape), dtype=dtype)
        targets[stored] = Held(rows, item.start, (count, *shape))


@contextmanager
def attributes_of(opened: Opened, model: nn.Module) -> Iterator[None]:
    """Gives a model a checkpoint's attributes while it lasts, and its own back at the end."""
    saved = opened.values.get("attributes", {})
    own = Snapshot(model, has=lambda place: False, has_attribute=lambda name: name in saved)
    put_saved(model, saved)
    try:
        yield
    finally:
        own.put_back()


def restore_forward(opened: Opened, training: Training, targets: Mapping[str, Item]) -> None:
    """Gives a model its attributes and each micro-batch's own values back, once they are read."""
    state = training.forward_state
    state.attributes.take(training.model, opened.values.get("attributes", {}))
    state.settle()
    if state.own is None:
        return
    rows = {}
    for stored, item in targets.items():
        if stored.startswith(OWN):
            assert isinstance(item, Held)
            rows[stored.removeprefix(OWN)] = item.rows
    state.own.take(rows)
