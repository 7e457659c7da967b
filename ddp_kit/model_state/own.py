"""Each micro-batch's own value, which goes on from step to step: a hidden state, for instance."""

from collections.abc import Mapping
from typing import final

import torch

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.errors import DdpKitError
from ddp_kit.model_state.kept import Base, current
from ddp_kit.model_state.places import Place


@final
class Own:
    """A value for each micro-batch of a global batch. The rank that runs it keeps it.

    Between steps, and so in evaluations, the place has the value that it had before the first step.
    """

    def __init__(self, places: list[Place], plan: BatchPlan, *, rank: int):
        """Args: `plan` says which micro-batches a rank runs."""
        self.places = places
        self.count = plan.micro_batches
        self.slots = range(plan.firsts[rank], plan.firsts[rank + 1])
        self._initial = [Base(place) for place in places]
        # By place, and by micro-batch; without one it is at its initial value.
        self._values: list[dict[int, torch.Tensor]] = [{} for _ in places]
        self._new: list[dict[int, torch.Tensor]] = [{} for _ in places]
        self._before: list[dict[int, torch.Tensor]] = [{} for _ in places]

    def begin(self) -> None:
        """See Kept."""
        self._new = [{} for _ in self.places]
        self._before = [dict(values) for values in self._values]

    def rewind(self, slot: int) -> None:
        """See Kept. The base is the micro-batch's own of the step before."""
        for base, values in zip(self._initial, self._values, strict=True):
            if slot in values:
                base.write(values[slot])
            else:
                base.put()

    def capture(self, slot: int) -> None:
        """See Kept."""
        for place, new in zip(self.places, self._new, strict=True):
            value = current(place)
            if value is None:
                raise DdpKitError(f"the forward pass leaves nothing in the buffer {place.name}.")
            new[slot] = value

    def launch(self) -> None:
        """Nothing travels: each rank keeps its own."""

    def finish(self) -> None:
        """See Kept."""
        for values, new in zip(self._values, self._new, strict=True):
            values.update(new)
        self._put_initial()

    def restore(self) -> None:
        """See Kept."""
        # finish() has taken the step's.
        for values, before in zip(self._values, self._before, strict=True):
            values.clear()
            values.update(before)
        self._put_initial()

    def _put_initial(self) -> None:
        for base in self._initial:
            base.put()

    def stacked(self) -> dict[str, torch.Tensor]:
        """Returns by name the values of this rank's micro-batches, one a row.

        Raises: DdpKitError if they have different shapes.
        """
        found = {}
        for base, values in zip(self._initial, self._values, strict=True):
            rows = [values.get(slot, base.values) for slot in self.slots]
            shapes = {tuple(row.shape) for row in rows if row is not None}
            if len(shapes) != 1:
                raise DdpKitError(
                    f"the buffer {base.place.name}, each micro-batch's own, has the shapes "
                    f"{', '.join(map(str, sorted(shapes)))}: a checkpoint takes one. Register it "
                    "with the shape that it has in a micro-batch."
                )
            found[base.place.name] = torch.stack([row for row in rows if row is not None])
        return found

    def take(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Takes what `stacked` gave, of this rank's micro-batches."""
        for place, values in zip(self.places, self._values, strict=True):
            if place.name in rows:
                values.update(zip(self.slots, rows[place.name].unbind(), strict=True))
