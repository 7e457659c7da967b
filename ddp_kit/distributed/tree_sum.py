"""Summing along one fixed binary tree: the order does not depend on who holds which leaf.

Leaves are merged in pairs like the carries of a binary counter; what is left over at the end is
folded from the right.

Who holds a power of two of consecutive leaves, and only as many as everybody else, holds a whole
subtree: its sum is a node of the tree over all leaves, and the nodes of all ranks, folded by the
same rule, give that tree's root bit for bit. Addition of two floats commutes, so it does not matter
which of two is added to the other.

Source: EasyScale (SC'23) trains consistently on changing numbers of GPUs by simulating a fixed
number of workers; tree-based invariant kernels (arXiv 2511.17826) have this tree for tensor
parallelism.
"""

from collections.abc import Sequence

import torch

Leaf = list[torch.Tensor]


class Fold:
    """A sum under way: log2(leaves) partial sums at most.

    A leaf is a list of tensors, and is owned and changed from then on.
    """

    def __init__(self) -> None:
        self._nodes: list[tuple[int, Leaf]] = []

    @torch.no_grad()
    def push(self, leaf: Leaf) -> None:
        """Takes the next leaf."""
        size = 1
        while self._nodes and self._nodes[-1][0] == size:
            _, left = self._nodes.pop()
            torch._foreach_add_(left, leaf)
            leaf = left
            size *= 2
        self._nodes.append((size, leaf))

    @torch.no_grad()
    def add_to(self, last: Leaf, *, at: Sequence[int]) -> None:
        """Turns the last leaf, or a part of it, into the sum of all leaves.

        Args: `last` the tensors of the last leaf that have the numbers `at` in it.
        """
        for _, node in reversed(self._nodes):
            torch._foreach_add_(last, [node[i] for i in at])

    def clear(self) -> None:
        """Forgets all leaves."""
        self._nodes.clear()

    def total(self) -> Leaf:
        """Returns the sum of all leaves and forgets them."""
        _, last = self._nodes.pop()
        self.add_to(last, at=range(len(last)))
        self.clear()
        return last


def fold(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the sum of tensors along the tree; some of them are changed."""
    nodes = Fold()
    for part in parts:
        nodes.push([part])
    return nodes.total()[0]
