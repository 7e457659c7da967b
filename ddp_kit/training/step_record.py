"""The record of a step in metrics.jsonl: sums that travel over ranks beside training, and rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddp_kit.metrics import means
from ddp_kit.training.state import StepSums, Training

# [micro-batch of all ranks][name] -> (sum, count), a tensor where ranks are to be summed.
RecordSums = torch.Tensor | list[list[list[float]]]


@dataclass
class StepRecord:
    """A train record whose sums are on their way."""

    head: dict[str, Any]
    tail: dict[str, Any]
    names: list[str]
    sums: RecordSums
    # To be waited for in this order.
    works: "Sequence[dist.Work | None]"
    norms: Mapping[str, torch.Tensor]

    def read(self) -> dict[str, Any]:
        """Returns the whole record. Host-device synchronisation, steps late."""
        rows = self.sums.tolist() if isinstance(self.sums, torch.Tensor) else self.sums
        sums = {}
        for i, name in enumerate(self.names):
            total = sum(row[i][0] for row in rows)
            count = sum(row[i][1] for row in rows)
            sums[name] = (total, count)
        norms = {f"{name}grad_norm": float(norm) for name, norm in self.norms.items()}
        return {**self.head, **means(sums), **norms, **self.tail}


def launch_sums(
    training: Training, sums: StepSums, names: list[str]
) -> tuple[RecordSums, list[dist.Work | None]]:
    """Starts the sum of a step's pairs over ranks. Returns where it will be, and what to wait for,
    in this order."""
    group = training.group
    totals = sums.totals(group.device)
    # Not beside DDP's own sums: after a collective that failed unread, gloo lets a later one of the
    # same group wait until its timeout.
    travels_on = group.training if group.device.type == "cuda" else group.control
    if travels_on is None and group.device.type == "cpu":
        return totals.rows(names), []
    shape = (training.plan.micro_batches, len(names), 2)
    values = torch.zeros(shape, dtype=torch.float64, device=group.device)
    # x + 0 is exact, and the slots are summed in order.
    values[sums.first : sums.first + sums.size] = totals.tensor(names)
    if travels_on is None:
        return values, []
    works: list[dist.Work | None] = []
    if travels_on is group.control:
        # The packet that went before it in the same group.
        works.append(training.control.in_flight)
    works.append(dist.all_reduce(values, group=travels_on, async_op=True))
    return values, works


def learning_rates(sums: StepSums) -> dict[str, float]:
    """Returns `lr`, and with several parameter groups `lr/0`, `lr/1`, ..., under each objective's
    name."""
    rates = {"lr": float(next(iter(sums.rates.values()))[0])}
    for name, groups in sums.rates.items():
        rates[f"{name}lr"] = float(groups[0])
        if len(groups) > 1:
            rates |= {f"{name}lr/{i}": float(rate) for i, rate in enumerate(groups)}
    return rates
