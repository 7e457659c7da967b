"""Sums with counts: the only form in which losses and metrics travel.

They are added up in float64 and divided once at the end: a mean of means is wrong as soon as counts
differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Number = torch.Tensor | float | int


@dataclass(slots=True)
class LossSum:
    """What a recipe's loss returns for one micro-batch.

    Args: `total` the sum (not the mean) of the losses, a scalar tensor with a graph; `count` what
        to divide by: an int that is the same for every sample (their number, or a fixed number of
        tokens each), or a tensor where it varies (tokens that count, class weights); `metrics`
        {name: (sum, count)}.
    """

    total: torch.Tensor
    count: int | torch.Tensor
    metrics: Mapping[str, tuple[Number, Number]] = field(default_factory=dict)

    def plus_mean(self, term: torch.Tensor) -> "LossSum":
        """Returns the loss with a term of the mean (L1, L2, an auxiliary loss).

        The term, a scalar, is multiplied by the count, so that the division keeps it.
        """
        return replace(self, total=self.total + term * self.count)

    def sums(self) -> dict[str, tuple[Number, Number]]:
        """Returns the loss itself and the metrics, detached, as {name: (sum, count)}."""
        return {"loss": (self.total.detach(), self.count), **self.metrics}


class Totals:
    """Keeps named (sum, count) pairs of micro-batches in float64 on a device.

    It keeps a row for each, and not their sum: ranks put the rows of all in order and then add, so
    that the sum does not depend on who had which. On a CPU rows are lists of numbers, which cost
    less than tensors; on a device nothing is read back until `read`.
    """

    def __init__(self, device: torch.device):
        self._device = device
        # Of each row its names, in order, and what stands under them: a tensor (len(names), 2), on
        # a CPU [[sum, count], ...].
        self._rows: list[tuple[list[str], Any]] = []

    def add(self, sums: Mapping[str, tuple[Number, Number]]) -> None:
        """Adds one micro-batch's pairs."""
        names = sorted(sums)
        if self._device.type == "cpu":
            pairs = [[_number(value) for value in sums[name]] for name in names]
            self._rows.append((names, pairs))
            return
        values = []
        for name in names:
            for value in sums[name]:
                tensor = torch.as_tensor(value, dtype=torch.float64, device=self._device)
                values.append(tensor.detach())
        row = torch.stack(values).view(-1, 2) if values else self._blank(0, 2)
        self._rows.append((names, row))

    def rows(self, names: Sequence[str]) -> list[list[list[float]]]:
        """Returns the pairs on a CPU as numbers: [micro-batch][name] -> [sum, count].

        They are [0, 0] where a micro-batch has none of a name.
        """
        assert self._device.type == "cpu"
        found = []
        for own, pairs in self._rows:
            by_name = dict(zip(own, pairs, strict=True))
            found.append([by_name.get(name, [0.0, 0.0]) for name in names])
        return found

    def tensor(self, names: Sequence[str]) -> torch.Tensor:
        """Returns the pairs as one float64 tensor (micro-batches, len(names), 2).

        They are (0, 0) where a micro-batch has none of a name.
        """
        if self._device.type == "cpu":
            numbers = torch.tensor(self.rows(names), dtype=torch.float64)
            return numbers.view(len(self._rows), len(names), 2)
        rows = []
        absent = self._blank(2)
        for own, pairs in self._rows:
            by_name = dict(zip(own, pairs, strict=True))
            rows.append(torch.stack([by_name.get(name, absent) for name in names]))
        return torch.stack(rows) if rows else self._blank(0, len(names), 2)

    def read(self) -> dict[str, tuple[float, float]]:
        """Returns the sums of the pairs as floats. Waits for the device."""
        names = sorted(set().union(*(own for own, _ in self._rows)))
        if not names:
            return {}
        sums = self.tensor(names).sum(0).tolist()
        return {name: (total, count) for name, (total, count) in zip(names, sums, strict=True)}

    def _blank(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)


def _number(value: Number) -> float:
    return value.item() if isinstance(value, torch.Tensor) else float(value)


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Divides each sum by its count, once; a count of 0 gives nan."""
    found = {}
    for name, (total, count) in sums.items():
        found[name] = total / count if count else math.nan
    return found
