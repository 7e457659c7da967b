"""A count that `Data.count` tells before the forward pass, and that the loss must find too."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.distributed as dist

from ddp_kit.data.reader import MicroBatch
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.training.loss_count import EMPTY

# By which share counts may differ that were added up otherwise.
TOLERANCE = 1e-5


@final
class KnownCount:
    """`Data.count` tells the count of a batch before its forward pass; the sum over ranks runs
    beside that pass."""

    def __init__(self, count: Callable[[Any], float], *, group: Group, slots: int):
        self._count = count
        self._group = group
        self._slots = torch.zeros(slots, dtype=torch.float64)
        self._work: dist.Work | None = None
        self._step = 0
        # Of the micro-batches whose loss has not returned its own count yet.
        self._known: list[float] = []
        self._difference = torch.zeros((), dtype=torch.float64, device=group.device)

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Counts this rank's batches and starts the sum over ranks."""
        self._step = micro_batches[0].request.step + 1
        self._slots.zero_()
        self._known = [float(self._count(micro_batch.batch)) for micro_batch in micro_batches]
        for micro_batch, known in zip(micro_batches, self._known, strict=True):
            self._slots[micro_batch.request.micro_batch] = known
        if self._group.control_pg is not None:
            self._work = dist.all_reduce(self._slots, group=self._group.control_pg, async_op=True)

    def take(self, count: int | torch.Tensor, *, size: int) -> None:
        """What was counted beforehand holds, and the loss must count the same.

        Raises: DdpKitError if it does not; of a count on a CUDA device `look` says so.
        """
        known = self._known.pop(0)
        if isinstance(count, torch.Tensor) and count.is_cuda:
            own = count.detach().double()
            self._difference = torch.maximum(self._difference, _apart(own, known))
            return
        if _apart(torch.as_tensor(count, dtype=torch.float64), known) > TOLERANCE:
            raise DdpKitError(
                f"step {self._step}: Data(count=...) gives {known:g} where the loss counts "
                f"{float(count):g} in the same micro-batch of {size} samples; they must agree."
            )

    def look(self) -> None:
        """Raises: DdpKitError if a loss has counted something else."""
        # Host-device synchronisation.
        if float(self._difference) > TOLERANCE:
            raise DdpKitError(
                "since the last save or evaluation Data(count=...) has given another count than "
                f"the loss, by {float(self._difference):.3g} of it; they must agree."
            )

    def divisor(self) -> float:
        """The count of the global batch.

        Raises: DdpKitError if it is 0.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        whole = float(self._slots.sum())
        if not whole:
            raise DdpKitError(
                f"step {self._step}: {EMPTY}: Data(count=...) counts nothing in any rank's batch."
            )
        return whole

    def launch(self) -> None:
        """Nothing to do."""

    def factor(self) -> float:
        """Nothing is left to do."""
        return 1.0


def _apart(own: torch.Tensor, known: float) -> torch.Tensor:
    """Returns by which share of it a count differs from what was known of it."""
    return (own - known).abs() / max(abs(known), 1e-12)
