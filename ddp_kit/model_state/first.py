"""What stays of a change is the first micro-batch's that makes it."""

from typing import final

import torch
import torch.distributed as dist

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tensors_from_rank import as_bytes, kind_of, tensors_from_rank_0
from ddp_kit.model_state.kept import Base, current
from ddp_kit.model_state.places import Place


@final
class First:
    """What the first micro-batch of the global batch makes of it, which rank 0 runs.

    The shape may change, and a place be filled that was empty.
    """

    def __init__(self, group: Group, *, repeats: bool):
        """Args: `repeats` whether the base is to be put back within a step: there are several
        micro-batches, or backward changes values again.
        """
        self.places: list[Place] = []
        self.repeats = repeats
        self._group = group
        self._bases: list[Base] = []
        self._found: list[torch.Tensor | None] = []

    def begin(self) -> None:
        """See Kept."""
        self._bases = [Base(place) for place in self.places]
        self._found = [base.values for base in self._bases]

    def adopt(self, base: Base, value: torch.Tensor | None) -> None:
        """Takes a place in the middle of a step.

        Args: `base` the place before the step; `value` what stays of it, if this is rank 0.
        """
        self.places.append(base.place)
        self._bases.append(base)
        self._found.append(value)

    def rewind(self, slot: int) -> None:
        """See Kept."""
        if self.repeats:
            for base in self._bases:
                base.put()

    def capture(self, slot: int) -> None:
        """See Kept."""
        if slot == 0:
            self._found = [current(place) for place in self.places]

    def launch(self) -> None:
        """Nothing travels yet: buffers change until the last backward."""

    @torch.no_grad()
    def finish(self) -> None:
        """See Kept."""
        values = self._found
        if not self.repeats:
            # Of the one micro-batch that there is.
            values = [place.tensor for place in self.places]
        usual = [kind_of(base.values) for base in self._bases]
        found = tensors_from_rank_0(self._group, values, usual=usual)
        for base, value in zip(self._bases, found, strict=True):
            base.write(None if value is None else value.detach())

    def restore(self) -> None:
        """See Kept."""
        for base in self._bases:
            base.put()


@final
class FirstChange:
    """Of each element of a weight that is trained, what the first micro-batch that changes it
    makes of it.

    An Embedding scales down the rows that it looks up: those of all micro-batches count.
    """

    def __init__(self, group: Group, *, repeats: bool):
        """Args: `repeats` as First has it."""
        self.places: list[Place] = []
        self.repeats = repeats
        self._group = group
        self._bases: list[Base] = []
        # By place: which elements a micro-batch before has changed, and to what.
        self._changed: list[torch.Tensor] = []
        self._found: list[torch.Tensor] = []

    def begin(self) -> None:
        """See Kept."""
        self._bases = [Base(place) for place in self.places]
        self._found = []
        self._changed = []
        for base in self._bases:
            assert base.values is not None
            self._found.append(base.values.clone())
            self._changed.append(torch.zeros_like(base.values, dtype=torch.bool))

    def rewind(self, slot: int) -> None:
        """See Kept."""
        if self.repeats:
            for base in self._bases:
                base.put()

    @torch.no_grad()
    def capture(self, slot: int) -> None:
        """See Kept."""
        if not self.repeats:
            return
        for i, base in enumerate(self._bases):
            value = base.place.tensor
            assert value is not None
            is_new = (value.detach() != base.values) & ~self._changed[i]
            self._found[i] = torch.where(is_new, value.detach(), self._found[i])
            self._changed[i] |= is_new

    def launch(self) -> None:
        """Nothing travels beside backward."""

    @torch.no_grad()
    def finish(self) -> None:
        """See Kept."""
        if not self.repeats:
            for base in self._bases:
                value = base.place.tensor
                base.write(None if value is None else value.detach())
            return
        for base, value in zip(self._bases, self._of_first_rank(), strict=True):
            base.write(value)

    def _of_first_rank(self) -> list[torch.Tensor]:
        """Returns each element as the first rank that has changed it has it."""
        group = self._group
        if group.sums_pg is None or not self._bases:
            return self._found
        counts = [changed.any() for changed in self._changed]
        flags = torch.stack(counts).to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group.sums_pg)
        for i, is_changed in enumerate(flags.tolist()):
            if is_changed:
                self._found[i] = self._agreed(self._found[i], self._changed[i])
        return self._found

    def _agreed(self, found: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        group = self._group
        none = group.world_size
        # The smallest rank among those that have changed it.
        rank = torch.where(changed, group.rank, none).to(torch.int32).contiguous()
        dist.all_reduce(rank, dist.ReduceOp.MIN, group=group.sums_pg)
        # Where nobody has, all ranks have the base, and rank 0 gives it.
        gives = (rank == group.rank) | ((rank == none) & (group.rank == 0))
        bits = as_bytes(torch.where(gives, found, torch.zeros_like(found)))
        # All ranks but one have 0 there: no bit is lost.
        dist.all_reduce(bits, group=group.sums_pg)
        return bits.view(found.dtype).view(found.shape)

    def restore(self) -> None:
        """See Kept."""
        for base in self._bases:
            base.put()
