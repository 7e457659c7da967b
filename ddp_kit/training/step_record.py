"""The record of a step in metrics.jsonl: sums that travel over ranks beside training, and rates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddp_kit.metrics import means, numbers_of, tensor_of
from ddp_kit.training.state import StepSums, Training


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


def launch_sums(training: Training, sums: StepSums, names: list[str]) -> SumsOnTheWay:
    """Starts the sum of a step's pairs over ranks. Every rank calls it."""
    group = training.group
    # Not beside DDP's own sums: after a collective that failed unread, gloo lets a later one of the
    # same group wait until its timeout.
    travels_on = group.pg if group.device.type == "cuda" else group.control_pg
    if travels_on is None and group.device.type == "cpu":
        # One process, whose sums are all there are: no tensor is made.
        own = numbers_of(sums.rows(), names)
        return SumsOnTheWay([], lambda: own)
    shape = (training.plan.micro_batches, len(names), 2)
    values = torch.zeros(shape, dtype=torch.float64, device=group.device)
    # x + 0 is exact, and the slots are summed in order.
    values[sums.first : sums.first + sums.size] = tensor_of(sums.rows(), names, device=group.device)
    works: list[dist.Work | None] = []
    if travels_on is not None:
        if travels_on is group.control_pg:
            # The packet that went before it in the same group.
            works.append(training.control_packet.in_flight)
        works.append(dist.all_reduce(values, group=travels_on, async_op=True))
    return SumsOnTheWay(works, values.tolist)


def learning_rates(sums: StepSums) -> dict[str, float]:
    """Returns `lr`, and with several parameter groups `lr/0`, `lr/1`, ..., under each objective's
    name."""
    rates = {"lr": float(next(iter(sums.rates.values()))[0])}
    for name, groups in sums.rates.items():
        rates[f"{name}lr"] = float(groups[0])
        if len(groups) > 1:
            rates |= {f"{name}lr/{i}": float(rate) for i, rate in enumerate(groups)}
    return rates
