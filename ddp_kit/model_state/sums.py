"""What stays of a change is something of all micro-batches: their mean, or their sum."""

from typing import final

import torch

from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.model_state.kept import Base
from ddp_kit.model_state.places import Place
from ddp_kit.model_state.step_sum import StepSum


@final
class Averaged:
    """The mean of what all micro-batches make of it, or the base and the sum of their changes."""

    def __init__(
        self,
        places: list[Place],
        group: Group,
        *,
        word: str,
        micro_batches: int,
        repeats: bool,
        exact: bool,
    ):
        """Args: `word` mean or sum; `repeats` as First has it; `exact` adds along the fixed
        tree.
        """
        self.places = places
        self._factor = 1 / micro_batches if word == "mean" else 1.0
        self.repeats = repeats
        self._bases = [Base(place) for place in places]
        flat = torch.cat([_reals(base.values) for base in self._bases])
        self._sum = StepSum(torch.zeros_like(flat), group, exact=exact)

    def begin(self) -> None:
        """See Kept."""
        self._bases = [Base(place) for place in self.places]
        self._sum.begin()

    def rewind(self, slot: int) -> None:
        """See Kept."""
        if self.repeats:
            for base in self._bases:
                base.put()

    @torch.no_grad()
    def capture(self, slot: int) -> None:
        """See Kept. Raises: DdpKitError for one of another shape."""
        if not self.repeats:
            return
        changes = []
        for base in self._bases:
            value = base.place.tensor
            assert base.values is not None
            if value is None or value.shape != base.values.shape:
                raise DdpKitError(
                    f"the forward pass changes the shape of {base.place.name}, which "
                    "Recipe(buffers=...) averages or sums: register it with its whole shape."
                )
            changes.append(_reals(value.detach().to(base.values.dtype)) - _reals(base.values))
        self._sum.total.add_(torch.cat(changes))
        self._sum.end_leaf()

    def launch(self) -> None:
        """See Kept."""
        if self.repeats:
            self._sum.launch()

    @torch.no_grad()
    def finish(self) -> None:
        """See Kept."""
        if not self.repeats:
            for base in self._bases:
                value = base.place.tensor
                base.write(None if value is None else value.detach())
            return
        total = self._sum.wait()
        begin = 0
        for base in self._bases:
            assert base.values is not None
            reals = _reals(base.values)
            change = total[begin : begin + len(reals)]
            begin += len(reals)
            made = torch.add(reals, change, alpha=self._factor)
            if base.values.is_complex():
                made = torch.view_as_complex(made.view(-1, 2))
            base.write(made.view(base.values.shape))

    def restore(self) -> None:
        """See Kept."""
        for base in self._bases:
            base.put()


def _reals(tensor: torch.Tensor | None) -> torch.Tensor:
    """Returns a tensor's numbers, flat; of complex ones both parts."""
    assert tensor is not None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)
