"""Where DeepSpeed's ZeRO keeps what of a parameter: flat partitions, which begin and end anywhere
in a tensor.

DeepSpeed puts partitions into the place of parameters in the optimizer, whose state is then keyed
by them. Here is the map from parameters to elements of this rank's partitions, with the gradients
in them and the optimizer's state by parameter. State that is not there for each element is refused:
a partition of it would have no meaning.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddp_kit.distributed.local_shard import Fragment
from ddp_kit.errors import ConfigError
from ddp_kit.strategies.optimizer_view import State, empty_as_torch_has_it


@dataclass(frozen=True, kw_only=True)
class PartitionSlice:
    """Where this rank has its elements of a parameter.

    `size` elements of a partition from `at` on are those of a parameter of `shape` from `start` on.
    """

    partition: torch.Tensor
    at: int
    start: int
    size: int
    shape: tuple[int, ...]


def slices_of(zero: Any, *, stage: int) -> dict[nn.Parameter, PartitionSlice]:
    """Returns where this rank has its elements of each parameter, of some none, from DeepSpeed's
    optimizer."""
    found = _slices_at_3(zero) if stage == 3 else _slices_at_1_and_2(zero)
    return dict(found)


def _slices_at_1_and_2(zero: Any) -> Iterator[tuple[nn.Parameter, PartitionSlice]]:
    """A group's parameters lie one after the other, and are cut into as many partitions as there
    are ranks."""
    rank = dist.get_rank(zero.dp_process_group)
    for i, partition in enumerate(zero.single_partition_of_fp32_groups):
        begin = rank * partition.numel()
        end = begin + partition.numel()
        parameters = zero.round_robin_bit16_groups[i]
        offsets = zero.round_robin_bit16_offsets[i]
        for parameter, offset in zip(parameters, offsets, strict=True):
            low = max(offset, begin)
            high = min(offset + parameter.numel(), end)
            size = max(0, high - low)
            at = 0
            start = 0
            if size:
                at = low - begin
                start = low - offset
            own = PartitionSlice(
                partition=partition, at=at, start=start, size=size, shape=tuple(parameter.shape)
            )
            yield parameter, own


def _slices_at_3(zero: Any) -> Iterator[tuple[nn.Parameter, PartitionSlice]]:
    """Each parameter is cut by itself; a partition holds this rank's part of each."""
    for group in zero.fp16_groups:
        for parameter in group:
            index, at, length = zero.grad_position[zero.get_param_id(parameter)]
            start = min(dist.get_rank(parameter.ds_process_group) * length, parameter.ds_numel)
            own = PartitionSlice(
                partition=zero.fp32_partitioned_groups_flat[index],
                at=at,
                start=start,
                size=min(length, parameter.ds_numel - start),
                shape=tuple(parameter.ds_shape),
            )
            yield parameter, own


def gradients_of(zero: Any, *, stage: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yields this rank's elements of the summed gradients, which DeepSpeed's optimizer reads as it
    steps."""
    groups = zero.fp16_groups if stage == 3 else zero.params_in_partition
    for i, parameters in enumerate(groups):
        # Padding follows the last one.
        yield from zip(parameters, zero.averaged_gradients[i], strict=False)


@final
class PartitionedOptimizer:
    """The view of an optimizer that steps partitions. Each rank keeps some elements of every
    parameter's state, of some none."""

    # An optimizer may keep state of one rank's partition and none of another's.
    has_all = False
    has_whole = False
    heeds_found_inf = False

    def __init__(
        self,
        optimizer: Optimizer,
        slices: Mapping[nn.Parameter, PartitionSlice],
        group: dist.ProcessGroup,
        *,
        step: Callable[[], None],
        refresh: Callable[[], None],
    ):
        """Args: `step` of DeepSpeed's engine; `refresh` takes weights that were read into the model
        into the partitions.
        """
        self.stepped = optimizer
        self._optimizer = optimizer
        self._slices = slices
        self._group = group
        self._step = step
        self._refresh = refresh

    def step(self) -> None:
        """See OptimizerView."""
        self._step()

    def items(self) -> Iterator[tuple[nn.Parameter, State]]:
        """See OptimizerView.

        Of a tensor over the parameter's elements there are those that are here, in one dimension;
        other values are as they are.

        Raises: ConfigError for another tensor.
        """
        for parameter, own in self._slices.items():
            state = self._optimizer.state.get(own.partition, {})
            found = {}
            for key, value in state.items():
                self._require_elementwise(key, value, own)
                is_split = isinstance(value, torch.Tensor) and value.dim()
                found[key] = value.narrow(0, own.at, own.size) if is_split else value
            if found:
                yield parameter, found

    def _require_elementwise(self, key: str, value: Any, own: PartitionSlice) -> None:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return
        if value.shape != own.partition.shape:
            raise ConfigError(
                f"--strategy deepspeed: {type(self._optimizer).__name__} keeps {key!r} of shape "
                f"{tuple(value.shape)}, not one number for each weight, and DeepSpeed splits "
                "weights anywhere. Type --strategy zero1, or another optimizer."
            )

    def part(self, parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor | Fragment:
        """See OptimizerView."""
        if not tensor.dim():
            return tensor
        own = self._slices[parameter]
        return Fragment(tensor, own.start, own.shape, self._group)

    def empty(
        self, parameter: nn.Parameter, *, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor | Fragment | None:
        """See OptimizerView."""
        own = self._slices.get(parameter)
        if own is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        if shape == own.shape:
            content = torch.empty(own.size, dtype=dtype, device=own.partition.device)
            return Fragment(content, own.start, own.shape, self._group)
        if shape:
            return None
        return empty_as_torch_has_it(self._optimizer, parameter, shape=shape, dtype=dtype)

    def restore(self, states: Mapping[nn.Parameter, State]) -> None:
        """See OptimizerView. The partitions take the restored weights too.

        Raises: ConfigError if two parameters of a partition have different values of what is one
            for all its elements.
        """
        self._optimizer.state.clear()
        for parameter, state in states.items():
            own = self._slices.get(parameter)
            if own is not None:
                self._restore(own, state)
        self._refresh()

    def _restore(self, own: PartitionSlice, state: State) -> None:
        """Puts a parameter's state into that of its partition."""
        kept = self._optimizer.state[own.partition]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                if key not in kept:
                    kept[key] = torch.zeros_like(
                        own.partition, dtype=value.dtype, requires_grad=False
                    )
                kept[key].narrow(0, own.at, own.size).copy_(value)
            elif key in kept and bool(kept[key] != value):
                raise ConfigError(
                    f"--strategy deepspeed: the checkpoint's optimizer has {key} {value} for one "
                    f"parameter and {kept[key]} for another of the same group, and DeepSpeed steps "
                    "them as one. Type --strategy ddp, zero1 or fsdp."
                )
            else:
                kept[key] = value
