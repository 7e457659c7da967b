"""The record of a step in metrics.jsonl: sums that travel over ranks beside training, and rates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist

from ddp_kit.metrics import Number, Sums, means, numbers_of, tensor_of
from ddp_kit.training.state import StepSums, Training

MEAN = "loss_mean"


@final
class LossesSince:
    """Each objective's losses since the last record, of this rank.

    Each micro-batch of a step has a sum of its own: the sum of all, taken in their order, does not
    depend on who had which.
    """

    def __init__(self) -> None:
        # {objective: the [sum, count] of each of this rank's micro-batches}
        self._pairs: dict[str, list[list[Number]]] = {}

    def take(self, sums: StepSums) -> None:
        """Adds a step's losses. Waits for no device."""
        for i, (prefix, part) in enumerate(sums.parts):
            pairs = self._pairs.get(prefix)
            if pairs is None:
                pairs = [[0.0, 0.0] for _ in range(sums.size)]
                self._pairs[prefix] = pairs
            pair = pairs[i % sums.size]
            total, count = part["loss"]
            pair[0] = _added(pair[0], total)
            pair[1] = _added(pair[1], count)

    def names(self) -> list[str]:
        """Returns the names under which records have their means."""
        return [prefix + MEAN for prefix in self._pairs]

    def rows(self) -> list[Sums]:
        """Returns the sums of each micro-batch, and begins anew."""
        rows: list[Sums] = []
        for pairs_of_one in zip(*self._pairs.values(), strict=True):
            named = zip(self.names(), pairs_of_one, strict=True)
            rows.append({name: (total, count) for name, (total, count) in named})
        self._pairs = {}
        return rows


def _added(whole: Number, value: Number) -> Number:
    """Returns a sum of numbers, or on CUDA a tensor in float64 that is not read."""
    if not isinstance(value, torch.Tensor):
        return whole + value
    if not value.is_cuda:
        return whole + float(value.item())
    return whole + value if isinstance(whole, torch.Tensor) else whole + value.double()


@dataclass(frozen=True)
class SumsOnTheWay:
    """A step's sums of all ranks, which arrive beside training."""

    # To be waited for in this order.
    works: "Sequence[dist.Work | None]"
    # Once they are there: [micro-batch of all ranks][name] -> [sum, count].
    rows: Callable[[], list[list[list[float]]]]

    def wait(self) -> None:
        """Waits for the other ranks, not for the device."""
        for work in self.works:
            if work is not None:
                work.wait()


@dataclass
class StepRecord:
    """A train record whose sums are on their way."""

    head: dict[str, Any]
    tail: dict[str, Any]
    names: list[str]
    sums: SumsOnTheWay
    norms: Mapping[str, torch.Tensor]

    def read(self) -> dict[str, Any]:
        """Returns the whole record. Host-device synchronisation, steps late."""
        rows = self.sums.rows()
        sums = {}
        for i, name in enumerate(self.names):
            total = sum(row[i][0] for row in rows)
            count = sum(row[i][1] for row in rows)
            sums[name] = (total, count)
        norms = {f"{name}grad_norm": float(norm) for name, norm in self.norms.items()}
        return {**self.head, **means(sums), **norms, **self.tail}


def launch_sums(
    training: Training, rows: Sequence[Sums], names: Sequence[str], *, first: int
) -> SumsOnTheWay:
    """Starts the sum of pairs over ranks. Every rank calls it.

    Args: `rows` of this rank's micro-batches, of which the first is the global batch's `first`.
    """
    group = training.group
    # Not beside DDP's own sums: after a collective that failed unread, gloo lets a later one of the
    # same group wait until its timeout.
    travels_on = group.pg if group.device.type == "cuda" else group.control_pg
    if travels_on is None and group.device.type == "cpu":
        # One process, whose sums are all there are: no tensor is made.
        own = numbers_of(rows, names)
        return SumsOnTheWay([], lambda: own)
    shape = (training.plan.micro_batches, len(names), 2)
    values = torch.zeros(shape, dtype=torch.float64, device=group.device)
    # x + 0 is exact, and the slots are summed in order.
    values[first : first + len(rows)] = tensor_of(rows, names, device=group.device)
    works: list[dist.Work | None] = []
    if travels_on is not None:
        if travels_on is group.control_pg:
            # The packet that went before it in the same group.
            works.append(training.control_packet.in_flight)
        works.append(dist.all_reduce(values, group=travels_on, async_op=True))
    return SumsOnTheWay(works, values.tolist)


def learning_rates(sums: StepSums) -> dict[str, float]:
    """Returns `lr`, and where parameter groups have different ones `lr/0`, `lr/1`, ..., under each
    objective's name."""
    rates = {"lr": float(next(iter(sums.rates.values()))[0])}
    for name, groups in sums.rates.items():
        rates[f"{name}lr"] = float(groups[0])
        numbers = [float(rate) for rate in groups]
        if len(set(numbers)) > 1:
            rates |= {f"{name}lr/{i}": rate for i, rate in enumerate(numbers)}
    return rates


def loss_scales(training: Training) -> dict[str, float]:
    """Returns what fp16 adds to a record: each objective's loss scale, and the steps of which
    something was skipped."""
    found: dict[str, float] = {}
    for objective in training.objectives:
        if objective.scale.is_on:
            found.setdefault("loss_scale", objective.scale.scale)
            found[f"{objective.name}loss_scale"] = objective.scale.scale
            found["skipped"] = training.skipped
    return found
