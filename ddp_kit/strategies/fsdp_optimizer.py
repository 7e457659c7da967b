"""The optimizer's view under fsdp: its state is split over the ranks as the parameters are."""

import re
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.distributed.local_shard import is_split
from ddp_kit.errors import ConfigError
from ddp_kit.strategies.fused_step import step_quietly
from ddp_kit.strategies.optimizer_view import (
    State,
    empty_as_torch_has_it,
    kept_states,
    replace_states,
)
from ddp_kit.strategies.outside_use import PartialReadGuard, reads_numbers

# Words by which torch's errors about split tensors are known.
SPLIT_TENSOR_WORDS = {"DTensor", "DeviceMesh", "placement"}


@final
class SplitOptimizer:
    """Each rank keeps its rows of every parameter's state."""

    has_all = True
    has_whole = False
    heeds_found_inf = False

    def __init__(self, optimizer: Optimizer):
        self.stepped = optimizer
        self._optimizer = optimizer
        self._kind = type(optimizer).__name__
        self._has_stepped = False

    def step(self) -> None:
        """Steps the optimizer, watched for the first time.

        Raises: ConfigError for an optimizer that does what FSDP2's tensors cannot.
        """
        if self._has_stepped:
            self._step()
            return
        self._has_stepped = True
        with PartialReadGuard(reads_numbers(self._optimizer)):
            self._step()

    def _step(self) -> None:
        try:
            step_quietly(self._optimizer)
        except (NotImplementedError, RuntimeError) as error:
            words = re.findall(r"\w+", str(error))
            if SPLIT_TENSOR_WORDS.isdisjoint(words):
                raise
            raise ConfigError(
                f"--strategy fsdp: {self._kind} cannot step weights that are split ({error}). "
                "Type --strategy zero1."
            ) from error

    def items(self) -> Iterator[tuple[nn.Parameter, State]]:
        """See OptimizerView."""
        yield from kept_states(self._optimizer)

    def part(self, parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor | None:
        """See OptimizerView. A tensor says itself which rows of it are here."""
        is_alike = is_split(tensor) and tensor.shape == parameter.shape
        if tensor.dim() and not is_alike:
            return None
        return tensor

    def empty(
        self, parameter: nn.Parameter, *, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """See OptimizerView."""
        if shape and shape != parameter.shape:
            return None
        return empty_as_torch_has_it(self._optimizer, parameter, shape=shape, dtype=dtype)

    def restore(self, states: Mapping[nn.Parameter, State]) -> None:
        """See OptimizerView."""
        replace_states(self._optimizer, states)
