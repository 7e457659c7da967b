"""A sum over the micro-batches of a step, of all ranks: asynchronous, beside backward."""

import torch
import torch.distributed as dist

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tree_sum import Fold, fold


class StepSum:
    """One flat tensor, to which each micro-batch adds.

    Every rank makes the calls of a step in this order: `begin`, then per micro-batch `end_leaf`
    after it was added to `total`, `launch` after the last one, `wait`.
    """

    def __init__(self, total: torch.Tensor, group: Group, *, exact: bool):
        """Args: `total` the memory of the sum; `exact` sums along the fixed tree."""
        self.total = total
        self._group = group
        self._tree = Fold() if exact else None
        # Of the tree, one for each rank.
        self._nodes: list[torch.Tensor] = []
        self._work: dist.Work | None = None

    def begin(self) -> None:
        """Takes the first micro-batch of a step."""
        self.total.zero_()

    def end_leaf(self) -> None:
        """Closes what a micro-batch has added."""
        if self._tree is not None:
            self._tree.push([self.total.clone()])
            self.total.zero_()

    def launch(self) -> None:
        """Starts the sum over ranks."""
        group = self._group.sums_pg
        if self._tree is None:
            if group is not None:
                self._work = dist.all_reduce(self.total, group=group, async_op=True)
            return
        own = self._tree.total()[0]
        if group is None:
            self._nodes = [own]
            return
        self._nodes = [torch.empty_like(own) for _ in range(self._group.world_size)]
        self._work = dist.all_gather(self._nodes, own, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """Returns the sum over all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._nodes:
            self.total.copy_(fold(self._nodes))
        return self.total
