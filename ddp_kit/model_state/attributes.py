"""Plain attributes of modules that training changes: counters, rates, running values as numbers.

As with buffers, each micro-batch of a step starts from the step's base, and what the first one of
the global batch makes of it stays, on all ranks. Checkpoints hold them.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import nn

from ddp_kit.distributed.collectives import short_from_rank_0
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError, some
from ddp_kit.io.logs import logger
from ddp_kit.model_state.images import Encoded, Image, decoded, encoded, image_of
from ddp_kit.model_state.places import Attribute


@final
class PlainAttributes:
    """Those that were seen to change; see Kept."""

    def __init__(self, group: Group, *, repeats: bool):
        """Args: `repeats` as First has it."""
        self.attributes: list[Attribute] = []
        self.repeats = repeats
        self._group = group
        self._bases: list[Image] = []
        self._found: list[Encoded] = []

    def add(self, attributes: list[Attribute]) -> list[str]:
        """Takes further ones. Returns the names of those that are new."""
        known = {attribute.name for attribute in self.attributes}
        new = [attribute for attribute in attributes if attribute.name not in known]
        self.attributes += new
        return [attribute.name for attribute in new]

    def begin(self) -> None:
        """See Kept."""
        self._let_go_of_large_ones()
        self._bases = [image_of(attribute.value) for attribute in self.attributes]
        self._found = []

    def _let_go_of_large_ones(self) -> None:
        """A list that grows without end is a record, and nothing that a pass goes by."""
        for attribute in list(self.attributes):
            if image_of(attribute.value).is_large:
                self.attributes.remove(attribute)
                logger.info(
                    "note: the attribute %s has grown large: from now on each rank has its own, "
                    "and checkpoints leave it out",
                    attribute.name,
                )

    def rewind(self, slot: int) -> None:
        """See Kept."""
        if self.repeats:
            self.restore()

    def capture(self, slot: int) -> None:
        """See Kept."""
        if slot == 0 and self.repeats:
            self._found = self.values()

    def launch(self) -> None:
        """Nothing travels yet."""

    def finish(self) -> None:
        """See Kept."""
        if not self.attributes or not self.repeats:
            return
        self._take_rank_0s(self._found)

    def agree(self) -> None:
        """Takes rank 0's values. Every rank calls it."""
        if self.attributes:
            self._take_rank_0s(self.values())

    def _take_rank_0s(self, own: list[Encoded]) -> None:
        text = json.dumps(own).encode() if self._group.rank == 0 else b""
        values = json.loads(short_from_rank_0(self._group, text))
        for attribute, value in zip(self.attributes, values, strict=True):
            if value is None and image_of(attribute.value).is_large:
                continue
            put(attribute, decoded(value))

    def restore(self) -> None:
        """See Kept."""
        for attribute, base in zip(self.attributes, self._bases, strict=True):
            vars(attribute.module)[attribute.key] = base.put_back()

    def values(self) -> list[Encoded]:
        """Returns the values as JSON can hold them.

        Raises: DdpKitError for one that is no longer plain.
        """
        found: list[Encoded] = []
        for attribute in self.attributes:
            value = attribute.value
            if image_of(value).is_large:
                found.append(None)
                continue
            if not image_of(value).is_plain:
                raise DdpKitError(
                    f"the attribute {attribute.name} was plain data and is now a "
                    f"{type(value).__name__}, which no checkpoint can hold: keep tensors in a "
                    "buffer, register_buffer(..., persistent=False) where it is a cache."
                )
            found.append(encoded(value))
        return found

    def saved(self) -> dict[str, Encoded]:
        """Returns the values by name."""
        names = [attribute.name for attribute in self.attributes]
        return dict(zip(names, self.values(), strict=True))

    def take(self, model: nn.Module, saved: Mapping[str, Encoded]) -> None:
        """Takes what `saved` gave, of attributes too that were not seen to change by now."""
        self.add(put_saved(model, saved))


def put_saved(model: nn.Module, saved: Mapping[str, Encoded]) -> list[Attribute]:
    """Gives a model what `PlainAttributes.saved` gave. Returns the attributes that it has."""
    found = []
    modules = dict(model.named_modules())
    for name, value in saved.items():
        owner, _, key = name.rpartition(".")
        if owner not in modules:
            continue
        attribute = Attribute(name, modules[owner], key)
        if value is not None or not image_of(attribute.value).is_large:
            put(attribute, decoded(value))
            found.append(attribute)
    return found


def attribute_note(names: Sequence[str]) -> str:
    """Returns what the user should know of attributes that training changes."""
    return (
        f"the forward pass changes the attributes {some(names)} of the model: what the first "
        "micro-batch of a step makes of them stays, and checkpoints hold them"
    )


def put(attribute: Attribute, value: Any) -> None:
    """Gives an attribute a value: into the same container where it has one."""
    live = vars(attribute.module).get(attribute.key)
    if isinstance(live, dict) and isinstance(value, dict):
        if live != value:
            live.clear()
            live.update(value)
    elif isinstance(live, (list, deque)) and type(live) is type(value):
        if live != value:
            live.clear()
            live.extend(value)
    elif isinstance(live, set) and isinstance(value, set):
        live.clear()
        live.update(value)
    else:
        vars(attribute.module)[attribute.key] = value
