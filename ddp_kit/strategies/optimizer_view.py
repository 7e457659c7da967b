"""The `OptimizerView` seam: one objective's optimizer as a strategy has it.

Who steps what, and which rank keeps which part of the optimizer's state, is each strategy's own.
What steps, saves and restores asks here, by parameter, and knows no strategy.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, final

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.distributed.local_shard import Item
from ddp_kit.strategies.fused_step import inputs_of, step_quietly

State = Mapping[str, Any]  # what an optimizer keeps of one parameter


class OptimizerView(Protocol):
    """An optimizer under one strategy. Every rank has one for each objective."""

    has_all: bool
    """whether each rank keeps state of every parameter, if only a part; else a rank knows of some
    parameters only what the others tell it"""
    has_whole: bool
    """whether each rank keeps the whole state of every parameter, and what the optimizer keeps
    beside it is the same on all ranks"""
    stepped: Optimizer
    """the optimizer that steps: an attribute that a step changes is changed there"""
    heeds_found_inf: bool
    """whether a step on CUDA changes nothing where the optimizer's `found_inf` is not 0, so that
    the host need not wait for it"""

    def step(self) -> None:
        """Steps the optimizer. Every rank calls it.

        Raises: ConfigError for an optimizer that cannot step what it is given.
        """

    def items(self) -> Iterator[tuple[nn.Parameter, State]]:
        """Yields what this rank keeps of each parameter, where there is something.

        Raises: ConfigError for state that cannot be kept as the strategy keeps it.
        """

    def part(self, parameter: nn.Parameter, tensor: torch.Tensor) -> Item | None:
        """Returns a tensor of `items` with what it is a part of; None if it is neither one number
        nor split as its parameter is."""

    def empty(
        self, parameter: nn.Parameter, *, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Item | None:
        """Returns new memory for what this rank keeps of such a tensor of a parameter's state.

        It is on the meta device for what another rank keeps alone. None: a tensor of that shape
        cannot be split as its parameter is.
        """

    def restore(self, states: Mapping[nn.Parameter, State]) -> None:
        """Puts states, their tensors in memory that `empty` or `items` gave, in the place of all
        there are. Every rank calls it, once the weights are restored."""


@final
class WholeOptimizer:
    """Each rank keeps the whole state of every parameter, and steps all of them alike."""

    has_all = True
    has_whole = True

    def __init__(self, optimizer: Optimizer, *, step: Callable[[], None] | None = None):
        """`step` stands for the optimizer's own."""
        self.stepped = optimizer
        self._optimizer = optimizer
        self._inputs = inputs_of(optimizer)
        self._step = step
        reads_it = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.heeds_found_inf = bool(reads_it) and step is None

    def step(self) -> None:
        """See OptimizerView."""
        if self._step is None:
            step_quietly(self._optimizer, inputs=self._inputs)
        else:
            self._step()

    def items(self) -> Iterator[tuple[nn.Parameter, State]]:
        """See OptimizerView."""
        yield from kept_states(self._optimizer)

    def part(self, parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """See OptimizerView."""
        return tensor

    def empty(
        self, parameter: nn.Parameter, *, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """See OptimizerView."""
        return empty_as_torch_has_it(self._optimizer, parameter, shape=shape, dtype=dtype)

    def restore(self, states: Mapping[nn.Parameter, State]) -> None:
        """See OptimizerView."""
        replace_states(self._optimizer, states)


def kept_states(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, State]]:
    """Yields an optimizer's own state by parameter, in the order of its groups, where there is
    some."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                yield parameter, optimizer.state[parameter]


def empty_as_torch_has_it(
    optimizer: Optimizer, parameter: nn.Parameter, *, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Returns new memory where torch's optimizers would have it: like the parameter, a scalar on
    the CPU."""
    if parameter.shape == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if shape or _steps_on_device(optimizer):
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    return torch.empty(shape, dtype=dtype, device="cpu")


def _steps_on_device(optimizer: Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def replace_states(optimizer: Optimizer, states: Mapping[nn.Parameter, State]) -> None:
    """Puts states in the place of an optimizer's own."""
    optimizer.state.clear()
    for parameter, state in states.items():
        optimizer.state[parameter] = dict(state)
