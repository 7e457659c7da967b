"""Sums with counts: the only form in which losses and metrics travel.

They are added up in float64 and divided once at the end: a mean of means is wrong as soon as counts
differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch

Number = torch.Tensor | float | int
Sums = Mapping[str, tuple[Number, Number]]  # of a micro-batch: {name: (sum, count)}
ABSENT = (0.0, 0.0)  # of a micro-batch that has none of a name


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
    metrics: Sums = field(default_factory=dict)

    def plus_mean(self, term: torch.Tensor) -> "LossSum":
        """Returns the loss with a term of the mean (L1, L2, an auxiliary loss).

        The term, a scalar, is multiplied by the count, so that the division keeps it.
        """
        return LossSum(self.total + term * self.count, self.count, self.metrics)

    def sums(self) -> dict[str, tuple[Number, Number]]:
        """Returns the loss itself and the metrics, detached, as {name: (sum, count)}."""
        return {"loss": (self.total.detach(), self.count), **self.metrics}


@final
class LossMean(LossSum):
    """What a loss returns that has a mean at hand in place of a sum, as torch's losses give it.

    It is turned into the sum, and is a LossSum from there on.

    Args: `mean` over the `count` of this micro-batch, a scalar tensor with a graph; `count` and
        `metrics` as those of LossSum. A count of 0 has no mean: return a LossSum where that occurs.
    """

    __slots__ = ()

    def __init__(self, mean: torch.Tensor, count: int | torch.Tensor, metrics: Sums | None = None):
        super().__init__(mean * count, count, {} if metrics is None else metrics)


def settled(sums: Sums, *, device: torch.device) -> Sums:
    """Returns a micro-batch's pairs as float64 tensors of their own, which later changes of the
    given ones do not reach."""
    names = sorted(sums)
    found = {}
    for name, pair in zip(names, tensor_of([sums], names, device=device)[0], strict=True):
        found[name] = (pair[0], pair[1])
    return found


def tensor_of(rows: Sequence[Sums], names: Sequence[str], *, device: torch.device) -> torch.Tensor:
    """Returns micro-batches' pairs as one float64 tensor (micro-batches, len(names), 2).

    A row is kept for each micro-batch, and not their sum: ranks put the rows of all in order and
    then add, so that the sum does not depend on who had which. Nothing is read back from a device.
    """
    shape = (len(rows), len(names), 2)
    if device.type == "cpu":
        # A tensor of each number would cost more than all the rest.
        return torch.tensor(numbers_of(rows, names), dtype=torch.float64).view(shape)
    values = []
    for sums in rows:
        for name in names:
            for value in sums.get(name, ABSENT):
                tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
                values.append(tensor.detach().reshape(()))
    if not values:
        return torch.zeros(shape, dtype=torch.float64, device=device)
    return torch.stack(values).view(shape)


def numbers_of(rows: Sequence[Sums], names: Sequence[str]) -> list[list[list[float]]]:
    """Returns micro-batches' pairs as numbers: [micro-batch][name] -> [sum, count]. Waits for the
    device that has them."""
    found = []
    for sums in rows:
        pairs = [sums.get(name, ABSENT) for name in names]
        found.append([[float_of(value) for value in pair] for pair in pairs])
    return found


def float_of(value: Number) -> float:
    """Returns a number of a user's as a float; its gradient, if it has one, is nobody's concern."""
    return value.item() if isinstance(value, torch.Tensor) else float(value)


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Divides each sum by its count, once; a count of 0 gives nan."""
    found = {}
    for name, (total, count) in sums.items():
        found[name] = total / count if count else math.nan
    return found
