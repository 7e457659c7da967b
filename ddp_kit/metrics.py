"""Sums with counts: the only form in which losses and metrics travel.

Owns: `LossSum`, adding up in float64, and dividing once at the end.
Refuses: means of means. They are wrong as soon as counts differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Number = torch.Tensor | float | int


@dataclass(slots=True)
class LossSum:
    """What a recipe's loss returns for one micro-batch.

    Args: `total` the sum (not the mean) of the losses, a scalar tensor with a graph; `count` what to divide by: an int that is
        the same for every sample (their number, or a fixed number of tokens each), or a tensor where it varies (tokens that
        count, class weights); `metrics` {name: (sum, count)}.
    """

    total: torch.Tensor
    count: int | torch.Tensor
    metrics: Mapping[str, tuple[Number, Number]] = field(default_factory=dict)

    def plus_mean(self, term: torch.Tensor) -> "LossSum":
        """Adds a term of the mean (L1, L2, an auxiliary loss): it is multiplied by the count, so that the division keeps it."""
        return replace(self, total=self.total + term * self.count)

    def sums(self) -> dict[str, tuple[Number, Number]]:
        """Returns the loss itself and the metrics, detached, as {name: (sum, count)}."""
        return {"loss": (self.total.detach(), self.count), **self.metrics}


class Totals:
    """Keeps named (sum, count) pairs of micro-batches in float64 on a device; reads nothing back until `read`.

    One row each, and not their sum: ranks put the rows of all in order and then add, so that the sum does not depend on who had which.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._rows: list[
            tuple[list[str], Any]
        ] = []  # a tensor (len(names), 2), on a CPU [[sum, count], ...]

    def add(self, sums: Mapping[str, tuple[Number, Number]]) -> None:
        """Adds one micro-batch's pairs."""
        names = sorted(sums)
        if self._device.type == "cpu":  # a number costs less than a tensor
            pairs = [
                [
                    value.item() if isinstance(value, torch.Tensor) else float(value)
                    for value in sums[name]
                ]
                for name in names
            ]
            self._rows.append((names, pairs))
            return
        values = [
            torch.as_tensor(value, dtype=torch.float64, device=self._device).detach()
            for name in names
            for value in sums[name]
        ]
        self._rows.append((names, torch.stack(values).view(-1, 2) if values else self._blank(0, 2)))

    def rows(self, names: Sequence[str]) -> list[list[list[float]]]:
        """Returns the pairs on a CPU as numbers: [micro-batch][name] -> [sum, count], [0, 0] where a micro-batch has none of a name."""
        assert self._device.type == "cpu"
        return [
            [row[own.index(name)] if name in own else [0.0, 0.0] for name in names]
            for own, row in self._rows
        ]

    def tensor(self, names: Sequence[str]) -> torch.Tensor:
        """Returns the pairs as one float64 tensor (micro-batches, len(names), 2), (0, 0) where a micro-batch has none of a name."""
        if self._device.type == "cpu":
            return torch.tensor(self.rows(names), dtype=torch.float64).view(
                len(self._rows), len(names), 2
            )
        rows = [
            torch.stack([row[own.index(name)] if name in own else self._blank(2) for name in names])
            for own, row in self._rows
        ]
        return torch.stack(rows) if rows else self._blank(0, len(names), 2)

    def read(self) -> dict[str, tuple[float, float]]:
        """Returns the sums of the pairs as floats. Waits for the device."""
        names = sorted({name for own, _ in self._rows for name in own})
        return (
            {
                name: (row[0], row[1])
                for name, row in zip(names, self.tensor(names).sum(0).tolist(), strict=True)
            }
            if names
            else {}
        )

    def _blank(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Divides each sum by its count, once; a count of 0 gives nan."""
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}
