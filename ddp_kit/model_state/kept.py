"""Buffers and weights that a forward pass changes, and what a step keeps of them.

Each micro-batch of a step starts from the step's base values, so that what it makes of them depends
neither on the number of ranks nor on which micro-batches a rank runs. What then stays is said by a
word: the first micro-batch's, the mean of all, their sum, or each micro-batch's own.

All classes are used alike. Every rank makes the calls of a step in this order: `begin`, then per
micro-batch `rewind` and `capture`, `launch` after the last forward pass, `finish` after the last
backward; `restore` after that if the step is not applied.
"""

from typing import Protocol

import torch

from ddp_kit.model_state.places import Place, is_same_memory


class Kept(Protocol):
    """What one step after the other changes outside the optimizer."""

    def begin(self) -> None:
        """Takes the base of a step."""

    def rewind(self, slot: int) -> None:
        """Puts the base in place, before the forward pass of a micro-batch of the global batch."""

    def capture(self, slot: int) -> None:
        """Takes what a forward pass has made of it, before its backward."""

    def launch(self) -> None:
        """Starts what travels over ranks, after the last forward pass of the step."""

    def finish(self) -> None:
        """Writes what stays, after the last backward."""

    def restore(self) -> None:
        """Puts the base back for good: the step is not applied."""


class Base:
    """A place's value at the beginning of a step, to be put back again and again."""

    def __init__(self, place: Place, values: torch.Tensor | None = None):
        """Args: `values` the place's own as they were, if they are known already."""
        self.place = place
        self.tensor = place.tensor
        # One that a forward pass registers is not there before it.
        self._is_there = place.is_there
        self._memory = None if self.tensor is None else self.tensor.detach()
        self.values = values
        if values is None and self._memory is not None:
            self.values = self._memory.clone()

    @torch.no_grad()
    def put(self) -> None:
        """Puts it in place."""
        self._put_tensor()
        if self._memory is not None and self.values is not None:
            self._memory.copy_(self.values)

    @torch.no_grad()
    def write(self, value: torch.Tensor | None) -> None:
        """Puts another value in place: into the same memory if it has the same shape."""
        if value is None or self._memory is None or value.shape != self._memory.shape:
            if value is None and not self._is_there:
                self.place.remove()
            else:
                self.place.put(None if value is None else value.clone())
            return
        self._put_tensor()
        if value.data_ptr() != self._memory.data_ptr():
            self._memory.copy_(value)

    def _put_tensor(self) -> None:
        if not self._is_there:
            self.place.remove()
        elif self.place.tensor is not self.tensor:
            self.place.put(self.tensor)
        if self.tensor is None or self._memory is None:
            return
        if not is_same_memory(self.tensor, self._memory):
            self.tensor.data = self._memory


def current(place: Place) -> torch.Tensor | None:
    """Returns a copy of what is in a place, without a graph."""
    tensor = place.tensor
    return None if tensor is None else tensor.detach().clone()
