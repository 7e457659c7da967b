"""How training is spread over ranks: the `Strategy` seam, and the choice of one by a flag.

Owns: what is wrapped around the loss call, when gradients are summed over ranks, and who holds which part of the state.
Refuses: batches, precision, what an optimizer does. Another strategy changes none of the numbers but by rounding.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddp_kit.distributed.process_group import Group
from ddp_kit.settings import Settings
from ddp_kit.strategies.ddp import DataParallel
from ddp_kit.strategies.exact import ExactDataParallel, ExactSingle
from ddp_kit.strategies.single import Single
from ddp_kit.strategies.whole import Function, Wrapped


class Strategy(Protocol):
    """Spreads one run over the ranks. Every rank calls each method, in the same order."""

    divisor: int
    """what the strategy divides the summed gradients by; the step multiplies it back in"""
    shards: dist.ProcessGroup | None
    """the ranks that hold the gradients together, each a part, and so run in lockstep; None: each rank holds them whole"""

    def shard(self, model: nn.Module) -> None:
        """Splits a model whose weights are equal on all ranks, before an optimizer is built from it."""

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns what is to be called in place of a loss call, and how its optimizer steps."""

    def enter(self, function: Function, *args: Any) -> Any:
        """Calls a function that uses the model, outside training's wrapper: for evaluation and rehearsal."""

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Within it go forward and backward of one micro-batch. After the last one of a rank gradients are those of all ranks.

        Raises: DdpKitError, naming parameters that got no gradient, for whose sum the other ranks would wait in vain.
        """

    def gradients(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Returns this rank's part of the summed gradients, to be changed in place before the optimizer steps."""


def choose_strategy(group: Group, settings: Settings) -> Strategy:
    """Returns the strategy for these ranks: one process is not wrapped at all.

    Raises: ConfigError if its package is missing.
    """
    if group.world_size == 1:
        return ExactSingle() if settings.exact else Single()
    if settings.exact:
        return ExactDataParallel(group, find_unused_parameters=settings.find_unused_parameters)
    if settings.strategy == "fsdp":
        from ddp_kit.strategies.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(group, settings.fsdp, precision=settings.precision)
    if settings.strategy == "deepspeed":
        from ddp_kit.strategies.deepspeed.engine import Zero

        return Zero(group, settings.deepspeed)
    ddp = DataParallel(group, find_unused_parameters=settings.find_unused_parameters, comm=settings.comm)
    if settings.strategy == "zero1":
        from ddp_kit.strategies.zero1 import ZeroOne

        return ZeroOne(group, ddp)
    return ddp


__all__ = ["DataParallel", "ExactDataParallel", "ExactSingle", "Function", "Single", "Strategy", "Wrapped", "choose_strategy"]
