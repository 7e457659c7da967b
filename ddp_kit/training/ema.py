"""Exponential moving average of the weights, which evaluation uses.

Training is not changed by it: the weights are put back after an evaluation, and `weights_sha256` is
that of the weights.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ddp_kit.distributed.local_shard import local


class WeightAverage:
    """Keeps `average = decay x average + (1 - decay) x weights` after every optimizer step.

    Each rank averages what it holds of `like`: floating-point and complex parameters and buffers,
    on the model's device. Whole numbers have no average, and stay.
    """

    def __init__(self, model: nn.Module, *, decay: float, reshaped: Collection[str] = ()):
        """Args: `reshaped` names of buffers whose shape changes, which cannot be averaged."""
        self._decay = decay
        everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        named = {name: tensor for name, tensor in everything.items() if is_weight(tensor)}
        for name in reshaped:
            named.pop(name, None)
        self.names = list(named)
        self.like = list(named.values())
        self._live = [local(tensor) for tensor in self.like]
        self.averages = [tensor.clone() for tensor in self._live]

    @torch.no_grad()
    def restart(self) -> None:
        """Begins again with the weights as they are."""
        torch._foreach_copy_(self.averages, self._live)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of this step into the average."""
        torch._foreach_lerp_(self.averages, self._live, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages into the model, and the weights back at the end.

        It costs one tensor of extra memory.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(self._live, self.averages, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)


def is_weight(tensor: torch.Tensor) -> bool:
    """Whether a buffer belongs to the weights: averaged and hashed with them."""
    return tensor.is_floating_point() or tensor.is_complex()
