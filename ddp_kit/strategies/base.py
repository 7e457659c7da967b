"""The `Strategy` seam: how training is spread over ranks.

A strategy says what is wrapped around the loss call, when gradients are summed over ranks, and who
holds which part of the state. Batches, precision and what an optimizer does are not its business:
another strategy changes none of the numbers but by rounding.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddp_kit.strategies.whole import Function, Wrapped


class Strategy(Protocol):
    """Spreads one run over the ranks. Every rank calls each method, in the same order."""

    divisor: int
    """what the strategy divides the summed gradients by; the step multiplies it back in"""
    shards: dist.ProcessGroup | None
    """the ranks that hold the gradients together, each a part, and so run in lockstep; None: each
    rank holds them whole"""

    def shard(self, model: nn.Module) -> None:
        """Splits a model whose weights are equal on all ranks, before an optimizer is built from
        it."""

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns what is to be called in place of a loss call, and its optimizer's view.

        Raises: ConfigError for an optimizer that the strategy cannot split.
        """

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """Returns what is to be called in place of what `wrap` or this gave before, which is let
        go: from now on other parameters of the loss call have `requires_grad`."""

    def enter(self, function: Function, *args: Any) -> Any:
        """Calls a function that uses the model outside training's wrapper, and returns its result.

        Evaluation and the dry run go through it.
        """

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Within it go forward and backward of one micro-batch.

        After the last one of a rank gradients are those of all ranks.

        Raises: DdpKitError, naming parameters that got no gradient, for whose sum the other ranks
            would wait in vain.
        """

    def gradients(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Returns this rank's part of the summed gradients, to be changed in place before the
        optimizer steps."""
