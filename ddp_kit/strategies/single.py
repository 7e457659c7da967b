"""One process: nothing is wrapped."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

from torch import nn
from torch.optim import Optimizer

from ddp_kit.strategies.optimizer_view import WholeOptimizer
from ddp_kit.strategies.whole import Whole, Wrapped


@final
class Single(Whole):
    """The strategy of one process."""

    divisor = 1

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` itself."""
        return Wrapped(call=call, optimizer_view=WholeOptimizer(optimizer))

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Nothing is ever summed over ranks."""
        return nullcontext()
