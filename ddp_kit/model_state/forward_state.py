"""All that forward passes change of a model: the same on all ranks at every step boundary.

These are running statistics, other buffers and weights by their word, and plain attributes. What
changes is known from the passes before the first step. A buffer that changes for the first time
later is noticed in that step; what else does, at the next save or evaluation.
"""

import json
from collections.abc import Iterable, Mapping
from typing import final

from torch import nn

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.control_packet import ControlPacket
from ddp_kit.distributed.local_shard import is_split
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tensors_from_rank import kind_of
from ddp_kit.errors import DdpKitError
from ddp_kit.io.logs import logger
from ddp_kit.model_state.attributes import PlainAttributes, attribute_note
from ddp_kit.model_state.first import First, FirstChange
from ddp_kit.model_state.first_step import FirstStep
from ddp_kit.model_state.kept import Kept
from ddp_kit.model_state.late_changes import LateChanges
from ddp_kit.model_state.own import Own
from ddp_kit.model_state.places import (
    BUFFERS,
    Attribute,
    Place,
    attribute_names,
    kinds_of,
    places_of,
)
from ddp_kit.model_state.running_stats import RunningStatistics
from ddp_kit.model_state.sums import Averaged
from ddp_kit.model_state.untouched import Changes, Snapshot


@final
class ForwardState:
    """What a step keeps of it. See `kept.Kept` for the order of calls, which every rank makes."""

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        plan: BatchPlan,
        *,
        control_packet: ControlPacket,
        words: Mapping[str, str],
        is_whole: bool = True,
        always: bool = False,
        exact: bool = False,
    ):
        """Args: `words` what is kept of buffers and frozen weights, by name; `is_whole` False: a
        strategy that splits weights will give modules attributes of its own; `always` puts the
        base back though there is one micro-batch, since its backward pass changes values again;
        `exact` adds along the fixed tree.
        """
        repeats = plan.micro_batches > 1 or always
        self.statistics = RunningStatistics(
            model, group, micro_batches=plan.micro_batches, always=always, exact=exact
        )
        self.first = First(group, repeats=repeats)
        self.weights = FirstChange(group, repeats=repeats)
        self.attributes = PlainAttributes(group, repeats=repeats)
        self.own: Own | None = None
        self._words = words
        self._named: list[Averaged] = []
        named: dict[str, list[Place]] = {}
        for place in places_of(model):
            if place.name in words:
                named.setdefault(words[place.name], []).append(place)
        for word in ("mean", "sum"):
            if word in named:
                averaged = Averaged(
                    named[word],
                    group,
                    word=word,
                    micro_batches=plan.micro_batches,
                    repeats=repeats,
                    exact=exact,
                )
                self._named.append(averaged)
        if "own" in named:
            self.own = Own(named["own"], plan, rank=group.rank)
        self.first.places += named.get("first", [])
        self._active: list[Kept] = []
        self.settle()
        self._model = model
        self._kinds = kinds_of(model)
        self._is_whole = is_whole
        self._attribute_names = attribute_names(model)
        # Names of buffers whose shape a forward pass was seen to change.
        self.reshaped: set[str] = set()
        self._group = group
        self._packet = control_packet
        self._splits = plan.micro_batches > 1
        self._late: LateChanges | None = None
        self._first_step: FirstStep | None = None
        self._has_begun = False
        self._before: Snapshot | None = None

    def take(self, changes: Changes, *, trained: set[int]) -> None:
        """Takes what was seen to change on any rank. Every rank calls it, with the model as it was.

        Args: `trained` the parameters that an optimizer steps, by their identity.
        """
        names = [place.name for place in changes.places]
        plain = [attribute.name for attribute in changes.plain]
        own = json.dumps([names, plain, sorted(changes.reshaped)]).encode()
        for row in gather_bytes(self._group, own):
            others_names, others_plain, reshaped = json.loads(row)
            names += [name for name in others_names if name not in names]
            plain += [name for name in others_plain if name not in plain]
            self.reshaped.update(reshaped)
        # In one order on all ranks.
        places = {place.name: place for place in (*changes.places, *places_of(self._model))}
        for name in sorted(set(names) & places.keys()):
            self._take_place(places[name], trained)
        self.attributes.add(self._attributes_named(plain))
        self._attribute_names.update(plain)
        self.settle()

    def _take_place(self, place: Place, trained: set[int]) -> None:
        kept = (*self.first.places, *self.weights.places)
        if self.statistics.owns(place.module, place.attribute):
            self.statistics.watch_assignments()
        elif place.name in self._words or any(other.name == place.name for other in kept):
            return
        elif place.register == BUFFERS or id(place.tensor) not in trained:
            self.first.places.append(place)
        else:
            self.weights.places.append(place)

    def _attributes_named(self, names: Iterable[str]) -> list[Attribute]:
        modules = dict(self._model.named_modules())
        found = []
        for name in sorted(names):
            owner, _, key = name.rpartition(".")
            found.append(Attribute(name, modules[owner], key))
        return found

    def has_attribute(self, name: str) -> bool:
        """Whether an attribute is the model's own, and no strategy's."""
        return self._is_whole or name in self._attribute_names

    def reshaped_by_now(self) -> dict[str, bool]:
        """Returns the buffers of another shape than before the first step, and whether state dicts
        have them."""
        found = {}
        for place in places_of(self._model):
            is_buffer = place.register == BUFFERS and place.tensor is not None
            if is_buffer and kind_of(place.tensor) != self._kinds.get(place.name):
                found[place.name] = place.is_persistent
        return found

    def repeat_always(self) -> None:
        """Puts the base back though there is one micro-batch: its backward changes it again."""
        self.statistics.average_always()
        self.first.repeats = True
        self.weights.repeats = True
        self.attributes.repeats = True
        for averaged in self._named:
            averaged.repeats = True

    def settle(self) -> None:
        """Takes note of which kinds there are. Whoever adds a place calls it."""
        self._active = [*self._named]
        if self.own is not None:
            self._active.append(self.own)
        if self.weights.places:
            self._active.append(self.weights)
        if self.first.places:
            self._active.append(self.first)
        if self.attributes.attributes:
            self._active.append(self.attributes)

    def look(self) -> None:
        """Looks for what has changed since the first step and was not seen to before. Every rank
        calls it, at a step boundary.

        Raises: DdpKitError on every rank for a buffer that is changed without a sign of it.
        """
        if self._before is None:
            return
        if self._late is not None:
            self._late.inspect()
        changes = self._before.changes().untold()
        unseen = self._late.unseen() if self._late is not None else []
        own = [unseen, [attribute.name for attribute in changes.plain]]
        names: set[str] = set()
        for row in gather_bytes(self._group, json.dumps(own).encode()):
            others_unseen, plain = json.loads(row)
            unseen += others_unseen
            names.update(plain)
        if unseen:
            raise DdpKitError(
                f"{unseen[0]} is changed by `.data`, and was not before the first step. Say in "
                f'Recipe(buffers={{"{unseen[0]}": ...}}) what stays of it: "mean", "sum", "first" '
                'or "own".'
            )
        new = self.attributes.add(self._attributes_named(names))
        if new:
            self.attributes.agree()
            self.settle()
            logger.info("note: %s", attribute_note(new))

    def _begin_first(self) -> None:
        """Before the first step: of one micro-batch there is nothing to choose."""
        self._has_begun = True
        self._before = Snapshot(
            self._model, has=lambda place: False, has_attribute=self.has_attribute
        )
        if not self._splits:
            return
        kept = (*self.first.places, *self.weights.places)
        known = {place.name for place in kept} | set(self._words)
        watched = []
        weights = []
        for place in places_of(self._model):
            if place.name in known or self.statistics.owns(place.module, place.attribute):
                continue
            if place.register == BUFFERS:
                watched.append(place)
            elif place.tensor is not None and not is_split(place.tensor):
                weights.append(place)
        self._late = LateChanges(watched, self.first, self._group, self._packet, weights=weights)
        if self.first.places or self.attributes.attributes:
            self._first_step = FirstStep(self._group)

    def begin_step(self) -> None:
        """Before a step's first objective."""
        self.statistics.begin_step()

    def begin(self) -> None:
        """See Kept."""
        if not self._has_begun:
            self._begin_first()
        self.statistics.begin()
        for kept in self._active:
            kept.begin()
        if self._late is not None:
            self._late.begin()

    def rewind(self, slot: int) -> None:
        """See Kept."""
        self.statistics.rewind()
        for kept in self._active:
            kept.rewind(slot)
        if self._late is not None:
            self._late.rewind()

    def capture(self, slot: int) -> None:
        """See Kept."""
        self.statistics.capture()
        for kept in self._active:
            kept.capture(slot)
        if self._late is not None:
            self._late.capture(slot)
        if self._first_step is not None:
            self._first_step.capture(self._unsaid(), self.attributes)

    def _unsaid(self) -> list[Place]:
        """Returns what is kept of the first micro-batch though nobody said so."""
        return [place for place in self.first.places if place.name not in self._words]

    def launch(self) -> None:
        """See Kept."""
        self.statistics.launch()
        for kept in self._active:
            kept.launch()
        if self._late is not None:
            self._late.launch()

    def finish(self) -> None:
        """See Kept."""
        self.statistics.finish()
        if self._late is not None and self._late.finish():
            self.settle()
        for kept in self._active:
            kept.finish()
        if self._first_step is not None:
            self._first_step.finish()
            self._first_step = None

    def restore(self) -> None:
        """See Kept."""
        self.statistics.restore()
        for kept in self._active:
            kept.restore()
