"""How the call of a loss becomes a distributed one: the `Strategy` seam.

Owns: what is wrapped around the loss call, and when gradients are summed over ranks.
Refuses: batches, precision, optimizers' rules. A strategy moves gradients and nothing else.
"""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from ddp_kit.groups import Group
from ddp_kit.strategies.ddp import DataParallel
from ddp_kit.strategies.exact import ExactDataParallel, ExactSingle
from ddp_kit.strategies.single import Single


class Strategy(Protocol):
    """Wraps loss calls for one run. Every rank calls each method."""

    @property
    def divisor(self) -> int:
        """What the strategy divides the summed gradients by; the step multiplies it back in."""

    def wrap(self, call: nn.Module) -> nn.Module:
        """Returns the module whose forward is to be called in place of `call`."""

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Within it go forward and backward of one micro-batch. After the last one of a rank gradients are those of all ranks."""

    def left_out(self, wrapped: nn.Module) -> list[str]:
        """Returns the parameters for whose sum the other ranks wait in vain: the backward pass that should have begun it left them out."""


def choose_strategy(group: Group, *, find_unused_parameters: bool, exact: bool = False) -> Strategy:
    """Returns the strategy for these ranks: one process is not wrapped at all."""
    if group.world_size == 1:
        return ExactSingle() if exact else Single()
    kind = ExactDataParallel if exact else DataParallel
    return kind(group, find_unused_parameters=find_unused_parameters)


__all__ = ["DataParallel", "ExactDataParallel", "ExactSingle", "Single", "Strategy", "choose_strategy"]
