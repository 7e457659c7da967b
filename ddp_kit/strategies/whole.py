"""What a strategy makes of a loss call, and what strategies share that leave the model whole."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddp_kit.strategies.optimizer_view import OptimizerView

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A loss call and its optimizer as a strategy has them."""

    call: nn.Module
    """stands for the loss call"""
    optimizer_view: OptimizerView
    """steps the optimizer, and gives and takes its state"""


def arguments_of(optimizer: Optimizer) -> dict[str, Any]:
    """Returns what an optimizer of the same kind is built with again: its defaults, without what
    it adds to them itself."""
    known = inspect.signature(type(optimizer).__init__).parameters
    return {key: value for key, value in optimizer.defaults.items() if key in known}


class Whole(ABC):
    """Every rank has the whole model and whole gradients."""

    shards: dist.ProcessGroup | None = None

    @abstractmethod
    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns what stands for the loss call."""

    def shard(self, model: nn.Module) -> None:  # noqa: B027  nothing is what these strategies have to do
        """Nothing is split."""

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """Returns it as it is: it does not know which parameters are trained."""
        return wrapped

    def enter(self, function: Function, *args: Any) -> Any:
        """Calls it: the bare module is at hand."""
        return function(*args)

    def gradients(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Returns the parameters' own."""
        return [parameter.grad for parameter in parameters if parameter.grad is not None]
