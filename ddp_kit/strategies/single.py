"""One process: nothing is wrapped."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

from torch import nn


@final
class Single:
    """The strategy of one process."""

    divisor = 1

    def wrap(self, call: nn.Module) -> nn.Module:
        """Returns `call` itself."""
        return call

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Nothing is ever summed over ranks."""
        return nullcontext()

    def left_out(self, wrapped: nn.Module) -> list[str]:
        """Nobody waits."""
        return []
