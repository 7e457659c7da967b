"""One module of ours around the model, for strategies that gather weights where a module is called.

Its forward calls any function, so that a loss may use parts of the model freely, as with ddp. It
does not know who gathers: FSDP2 and DeepSpeed put their hooks on it.
"""

from typing import Any, final

from torch import nn

from ddp_kit.strategies.usage_guard import UsageGuard
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
class CallThroughRoot(nn.Module):
    """A loss call that goes through the root, or through what stands for it."""

    def __init__(self, root: nn.Module, call: nn.Module, guard: UsageGuard):
        super().__init__()
        self._held = [root, call]  # in a list: they are no submodules
        self._guard = guard

    def forward(self, batch: Any) -> Any:
        """Calls the loss on a micro-batch."""
        root, _ = self._held
        total, *rest = root(self._call, batch)
        return self._guard.watched(total), *rest

    def _call(self, batch: Any) -> Any:
        result = self._held[1](batch)
        # Inside the root: before what it does at the end of its forward pass.
        self._guard.end_forward()
        return result
