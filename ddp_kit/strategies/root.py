"""One module of ours around the model, for strategies that gather weights where a wrapped module is called.

Owns: a forward that calls any function, so that a loss may use parts of the model freely, as with ddp.
Refuses: knowing who gathers: FSDP2 and DeepSpeed put their hooks on it.
"""

from typing import Any, final

from torch import nn

from ddp_kit.strategies.usage_guard import Uses
from ddp_kit.strategies.whole import Function


@final
class Root(nn.Module):
    """Where parameters outside the wrapped modules are gathered."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Function, *args: Any) -> Any:
        """Calls the function."""
        return function(*args)


@final
class Through(nn.Module):
    """A loss call that goes through the root, or through what stands for it."""

    def __init__(self, root: nn.Module, call: nn.Module, uses: Uses):
        super().__init__()
        self._used = [root, call]  # in a list: they are no submodules
        self._uses = uses

    def forward(self, batch: Any) -> Any:
        """Calls the loss on a micro-batch."""
        root, _ = self._used
        total, *rest = root(self._noted, batch)
        return self._uses.watched(total), *rest

    def _noted(self, batch: Any) -> Any:
        result = self._used[1](batch)
        self._uses.end_forward()  # inside the root, before what it does at its end
        return result
