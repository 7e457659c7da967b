"""What a step's loss is divided by: the count over the whole global batch, and when it is known.

There are three cases behind one protocol: fixed, known before the forward pass (`known_count`), and
found in the losses. Only a count that the losses alone know is summed while training, beside the
last backward pass; the others make nothing wait.

What is summed over ranks has one slot for each micro-batch of the global batch, zero in those of
others: the order of the sum does not depend on the number of ranks.
"""

from collections.abc import Sequence
from typing import Protocol, final

import torch
import torch.distributed as dist

from ddp_kit.data.reader import MicroBatch
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError

EMPTY = "the loss's count over the whole global batch is 0, so there is no mean to take"


class Count(Protocol):
    """The count of one step.

    The step calls `begin`, then for each micro-batch `take` and `divisor`, `launch` before the last
    backward pass, and `factor` after it.
    """

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Starts a step."""

    def take(self, count: int | torch.Tensor, *, size: int) -> None:
        """Takes what the loss of a micro-batch of `size` samples returned."""

    def divisor(self) -> float:
        """Returns what the sums are divided by before backward."""

    def launch(self) -> None:
        """Starts what must be summed over ranks."""

    def factor(self) -> float | torch.Tensor:
        """Returns what gradients must still be multiplied by."""

    def look(self) -> None:
        """At a save or evaluation: looks whether what was counted beforehand was right."""


@final
class FixedCount:
    """The loss returns an int, the same for each sample: nothing is reduced.

    It is 1, or a fixed number of tokens.
    """

    def __init__(self, *, per_sample: int, global_batch: int):
        self._per_sample = per_sample
        self._whole = float(per_sample * global_batch)

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Nothing to do."""

    def take(self, count: int | torch.Tensor, *, size: int) -> None:
        """Raises: DdpKitError if the count is not that of the dry run."""
        if isinstance(count, torch.Tensor) or count != self._per_sample * size:
            raise DdpKitError(
                f"the loss's count is {count!r} for {size} samples, where it was the int "
                f"{self._per_sample} for each sample before. A count that varies must be a tensor "
                "always: LossSum(total, torch.tensor(count)), or known beforehand: Data(count=...)."
            )

    def divisor(self) -> float:
        """The count itself."""
        return self._whole

    def launch(self) -> None:
        """Nothing to do."""

    def factor(self) -> float:
        """Nothing is left to do."""
        return 1.0

    def look(self) -> None:
        """Nothing to do."""


@final
class FoundCount:
    """The loss returns a tensor. Backward runs on sums over `expected`; gradients are corrected
    once the count has come in.

    `expected` is a power of two, so that dividing by it and multiplying again changes no bits.
    """

    def __init__(self, *, expected: float, group: Group, slots: int):
        self._expected = expected
        self._group = group
        self._own: list[torch.Tensor] = []
        self._first = 0
        self._slots = torch.zeros(slots, dtype=torch.float64, device=group.device)
        self._work: dist.Work | None = None

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forgets the step before."""
        self._own.clear()
        self._first = micro_batches[0].request.micro_batch

    def take(self, count: int | torch.Tensor, *, size: int) -> None:
        """Notes a micro-batch's count."""
        own = torch.as_tensor(count, dtype=torch.float64, device=self._group.device)
        self._own.append(own.detach())

    def divisor(self) -> float:
        """The expected count."""
        return self._expected

    def launch(self) -> None:
        """Starts the sum over ranks, in the same order on all of them."""
        self._slots.zero_()
        self._slots[self._first : self._first + len(self._own)] = torch.stack(self._own)
        if self._group.sums_pg is not None:
            self._work = dist.all_reduce(self._slots, group=self._group.sums_pg, async_op=True)

    def factor(self) -> torch.Tensor:
        """Expected over found, a tensor on the device.

        A count of 0 gives inf, and so a step that is not applied.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._expected / self._slots.sum()

    def look(self) -> None:
        """Nothing to do."""
