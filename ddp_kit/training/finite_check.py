"""Whether gradients are finite, seen in the gradients themselves.

The check is on the reduced ones, which are equal on all ranks; a loss that is not finite marks its
own, so that none can miss it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import Node


def find_non_finite(
    gradients: list[torch.Tensor], found: torch.Tensor, *, one: torch.Tensor, is_mixed: bool
) -> None:
    """Sets `found` to 1 if a gradient is not finite.

    It is GradScaler's kernel, multiplying by `one`. `is_mixed`: the gradients have several dtypes,
    or complex ones, which the kernel does not take.
    """
    if not is_mixed:
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, one)
        return
    for gradient in gradients:
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient.resolve_conj())
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], found, one)


@contextmanager
def mark_added(total: torch.Tensor, mark: torch.Tensor) -> Iterator[None]:
    """Adds `mark` to the gradient of one parameter that a total depends on, during its backward.

    A total that is inf may send its parameters no gradient at all (a `where`, a clamp, a relu
    between), not even a nan: a nan that is added travels over ranks with the gradient.
    """
    node = _accumulation(total.grad_fn)
    if node is None:
        yield
        return

    def marked(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        gradient = gradients[0]
        # None where a function of the user's own gives none.
        return gradients if gradient is None else (gradient + mark.to(gradient.dtype),)

    handle = node.register_prehook(marked)
    try:
        yield
    finally:
        handle.remove()


def _accumulation(node: Node | None) -> Node | None:
    """Returns where the gradient of some parameter is added up, the nearest one in the graph."""
    waiting = [node]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return node
        waiting += [before for before, _ in node.next_functions]
    return None
