"""Where DeepSpeed's ZeRO keeps what of a parameter: flat partitions, which begin and end anywhere
in a tensor.

DeepSpeed puts partitions into the place of parameters in the optimizer, whose state is then keyed
by them. Here is the map from parameters to elements of this rank's partitions, with the gradients
in them and the optimizer's state by parameter. State that is not there for each element is refused:
a partition of it would have no meaning.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddp_kit.distributed.local_shard import Fragment
from ddp_kit.errors import ConfigError


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
class PartitionedState:
    """The state of an optimizer that steps partitions, by parameter."""

    def __init__(
        self,
        optimizer: Optimizer,
        slices: Mapping[nn.Parameter, PartitionSlice],
        group: dist.ProcessGroup,
    ):
        self._optimizer = optimizer
        self._slices = slices
        self._group = group

    def items(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Yields each parameter's state.

        Of a tensor over its elements there are those that are here, in one dimension; other values
        are as they are.

        Raises: ConfigError for another tensor.
        """
        for parameter, own in self._slices.items():
            state = self._optimizer.state.get(own.partition, {})
            found = {}
            for key, value in state.items():
                self._require_elementwise(key, value, own)
                is_split = isinstance(value, torch.Tensor) and value.dim()
                found[key] = value.narrow(0, own.at, own.size) if is_split else value
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

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer steps a parameter."""
        return parameter in self._slices

    def part(self, parameter: nn.Parameter, content: torch.Tensor) -> torch.Tensor | Fragment:
        """Returns a tensor of `items` with what it is a part of."""
        if not content.dim():
            return content
        own = self._slices[parameter]
        return Fragment(content, own.start, own.shape, self._group)

    def empty(self, parameter: nn.Parameter, *, dtype: torch.dtype) -> torch.Tensor:
        """Returns new memory for such a tensor."""
        own = self._slices[parameter]
        return torch.empty(own.size, dtype=dtype, device=own.partition.device)

    def restore(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Puts a parameter's state, as `items` has it, into that of its partition.

        Raises: ConfigError if another parameter of the partition has another value that is one for
            all elements.
        """
        own = self._slices[parameter]
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
