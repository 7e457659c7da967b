"""Buffers that a forward pass changes for the first time in the middle of a run.

They are watched by identity and version, which takes a look. Once one has changed on any rank, all
ranks keep what the first micro-batch makes of it, in this step already. Of weights no copy is at
hand: one that only now begins to change ends the run.
"""

import json
from typing import final

import torch
import torch.distributed as dist

from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.control_packet import ControlPacket
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError, some
from ddp_kit.io.logs import logger
from ddp_kit.model_state.first import First
from ddp_kit.model_state.images import same_bits
from ddp_kit.model_state.kept import Base, current
from ddp_kit.model_state.places import Place


@final
class LateChanges:
    """Watches buffers in the steps of several micro-batches. See `kept.Kept` for the calls."""

    def __init__(
        self,
        places: list[Place],
        first: First,
        group: Group,
        packet: ControlPacket,
        *,
        weights: list[Place],
    ):
        """Args: `places` to be watched; `first` takes those that change; `packet` travels in the
        same group; `weights` are watched in the step after each `inspect`.
        """
        self._first = first
        self._weights = weights
        self._inspects = True
        self._weight_versions: list[int] = []
        self._group = group
        self._packet = packet
        self._watched = [Base(place) for place in places]
        self._versions = [_version(base) for base in self._watched]
        # Those that this rank has seen to change in this step, with what stays of them.
        self._moved: dict[str, tuple[Base, torch.Tensor | None]] = {}
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def begin(self) -> None:
        """Takes the base of a step. Between steps others may have written into a buffer."""
        if self._inspects:
            self._weight_versions = [_version_of(place) for place in self._weights]
        for i, base in enumerate(self._watched):
            version = _version(base)
            if version != self._versions[i] or base.place.tensor is not base.tensor:
                self._watched[i] = Base(base.place)
                self._versions[i] = _version(self._watched[i])

    def rewind(self) -> None:
        """See Kept."""
        for base, _ in self._moved.values():
            base.put()

    def inspect(self) -> None:
        """Asks for a look at the weights in the next step."""
        self._inspects = True

    def capture(self, slot: int) -> None:
        """See Kept. Raises: DdpKitError for a weight that has begun to change."""
        if self._inspects:
            self._refuse_changed_weights()
        for base, version in zip(self._watched, self._versions, strict=True):
            if base.place.tensor is base.tensor and _version(base) == version:
                continue
            if base.place.name not in self._moved:
                kept = current(base.place) if slot == 0 else base.values
                self._moved[base.place.name] = (base, kept)

    def _refuse_changed_weights(self) -> None:
        for place, version in zip(self._weights, self._weight_versions, strict=True):
            if _version_of(place) != version:
                raise DdpKitError(
                    f"the forward pass changes the weight {place.name}, as it did not before the "
                    "first step. Let it change from the first pass on, or make it a buffer; of a "
                    f'frozen one say in Recipe(buffers={{"{place.name}": ...}}) what stays, "mean" '
                    'or "first".'
                )

    def launch(self) -> None:
        """Asks whether any rank has seen a change."""
        if self._group.control_pg is None or not self._watched:
            return
        self._flag[0] = len(self._moved)
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group.control_pg, async_op=True
        )

    def finish(self) -> bool:
        """Keeps what has changed on any rank. Returns whether anything has."""
        self._inspects = False
        if self._work is not None:
            if self._packet.in_flight is not None:
                self._packet.in_flight.wait()
            self._work.wait()
            self._work = None
            if not self._flag[0]:
                return False
        elif not self._moved:
            return False
        names: set[str] = set()
        for row in gather_bytes(self._group, json.dumps(sorted(self._moved)).encode()):
            names.update(json.loads(row))
        watched = {base.place.name: base for base in self._watched}
        for name in sorted(names):
            base, value = self._moved.get(name, (watched[name], watched[name].values))
            self._first.adopt(base, value)
        self._watched = [base for base in self._watched if base.place.name not in names]
        self._versions = [_version(base) for base in self._watched]
        self._moved.clear()
        logger.info(
            "note: the forward pass changes %s from now on, as it did not before the first step; "
            "what the first micro-batch makes of it stays. "
            "Recipe(buffers={...}) says what else may",
            some(sorted(names)),
        )
        return True

    def unseen(self) -> list[str]:
        """Returns the names of those whose values have changed without a sign, by `.data`."""
        names = []
        for base, version in zip(self._watched, self._versions, strict=True):
            tensor = base.place.tensor
            if tensor is None or base.values is None or _version(base) != version:
                continue
            if not same_bits(tensor.detach(), base.values):
                names.append(base.place.name)
        return names


def _version(base: Base) -> int:
    return _version_of(base.place)


def _version_of(place: Place) -> int:
    tensor = place.tensor
    return -1 if tensor is None else tensor._version
