"""Where DeepSpeed's ZeRO keeps what of a parameter: flat partitions, which begin and end anywhere in a tensor.

Owns: the map from parameters to elements of this rank's partitions, the gradients in them, and the optimizer's state by parameter.
Refuses: state that is not there for each element: a partition of it would have no meaning.

DeepSpeed puts partitions into the place of parameters in the optimizer, whose state is then keyed by them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ddp_kit.distributed.local_shard import Fragment
from ddp_kit.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Elements `at` and following of a partition are elements `start` and following of a parameter of `shape`."""

    partition: torch.Tensor
    at: int
    start: int
    size: int
    shape: tuple[int, ...]


def places_of(zero: Any, *, stage: int) -> dict[nn.Parameter, Place]:
    """Returns where this rank has its elements of each parameter, of some none, from DeepSpeed's optimizer."""
    return dict(_places_3(zero) if stage == 3 else _places_1_2(zero))


def _places_1_2(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    """A group's parameters lie one after the other, and are cut into as many partitions as there are ranks."""
    rank = dist.get_rank(zero.dp_process_group)
    for i, partition in enumerate(zero.single_partition_of_fp32_groups):
        begin = rank * partition.numel()
        for parameter, offset in zip(
            zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True
        ):
            low, high = (
                max(offset, begin),
                min(offset + parameter.numel(), begin + partition.numel()),
            )
            size = max(0, high - low)
            yield (
                parameter,
                Place(
                    partition,
                    low - begin if size else 0,
                    low - offset if size else 0,
                    size,
                    tuple(parameter.shape),
                ),
            )


def _places_3(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    """Each parameter is cut by itself; a partition holds this rank's part of each."""
    for parameter in (parameter for group in zero.fp16_groups for parameter in group):
        index, at, length = zero.grad_position[zero.get_param_id(parameter)]
        start = min(dist.get_rank(parameter.ds_process_group) * length, parameter.ds_numel)
        size = min(length, parameter.ds_numel - start)
        yield (
            parameter,
            Place(
                zero.fp32_partitioned_groups_flat[index], at, start, size, tuple(parameter.ds_shape)
            ),
        )


def gradients_of(zero: Any, *, stage: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yields this rank's elements of the summed gradients, which DeepSpeed's optimizer reads as it steps."""
    groups = zero.fp16_groups if stage == 3 else zero.params_in_partition
    for i, parameters in enumerate(groups):
        yield from zip(
            parameters, zero.averaged_gradients[i], strict=False
        )  # padding follows the last one


@final
class Ungathered(TorchFunctionMode):
    """Watches a pass at stage 3 for weights that are used where DeepSpeed has not gathered them, and so are empty: a penalty would be 0."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._derived = list[
            torch.Tensor
        ]()  # kept, so that no other tensor gets the identity of one

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function. Raises: ConfigError if it makes something of an empty weight: a part of a loss's graph, or a number."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result
        name = next(
            (
                self._names[id(leaf)]
                for leaf in tree_leaves((args, kwargs))
                if id(leaf) in self._names and not leaf.numel()
            ),
            "",
        )
        if name and (result.grad_fn is not None or result.numel()):
            raise ConfigError(
                f"--deepspeed.stage 3: the loss or `evaluate` uses {name} outside the forward pass of its module, and weights are gathered "
                "there only. Let the optimizer decay weights, or type --deepspeed.stage 2, or --strategy fsdp."
            )
        if name and id(result) not in self._names:  # detached, for instance
            self._names[id(result)] = name
            self._derived.append(result)
        return result


@final
class Moments:
    """The state of an optimizer that steps partitions, by parameter."""

    def __init__(
        self, optimizer: Optimizer, places: Mapping[nn.Parameter, Place], group: dist.ProcessGroup
    ):
        self._optimizer, self._places, self._group = optimizer, places, group

    def items(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Yields each parameter's state: of a tensor over its elements those that are here, in one dimension; other values as they are.

        Raises: ConfigError for another tensor.
        """
        for parameter, place in self._places.items():
            state = self._optimizer.state.get(place.partition, {})
            for key, value in state.items():
                if (
                    isinstance(value, torch.Tensor)
                    and value.dim()
                    and value.shape != place.partition.shape
                ):
                    raise ConfigError(
                        f"--strategy deepspeed: {type(self._optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)}, not one "
                        "number for each weight, and DeepSpeed splits weights anywhere. Type --strategy zero1, or another optimizer."
                    )
            yield parameter, {key: _narrowed(value, place) for key, value in state.items()}

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer steps a parameter."""
        return parameter in self._places

    def part(self, parameter: nn.Parameter, content: torch.Tensor) -> torch.Tensor | Fragment:
        """Returns a tensor of `items` with what it is a part of."""
        place = self._places[parameter]
        return (
            Fragment(content, place.start, place.shape, self._group) if content.dim() else content
        )

    def empty(self, parameter: nn.Parameter, *, dtype: torch.dtype) -> torch.Tensor:
        """Returns new memory for such a tensor."""
        place = self._places[parameter]
        return torch.empty(place.size, dtype=dtype, device=place.partition.device)

    def restore(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Puts a parameter's state, as `items` has it, into that of its partition.

        Raises: ConfigError if another parameter of the partition has another value that is one for all elements.
        """
        place = self._places[parameter]
        own = self._optimizer.state[place.partition]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                if key not in own:
                    own[key] = torch.zeros_like(
                        place.partition, dtype=value.dtype, requires_grad=False
                    )
                own[key].narrow(0, place.at, place.size).copy_(value)
            elif key in own and bool(own[key] != value):
                raise ConfigError(
                    f"--strategy deepspeed: the checkpoint's optimizer has {key} {value} for one parameter and {own[key]} for another of "
                    "the same group, and DeepSpeed steps them as one. Type --strategy ddp, zero1 or fsdp."
                )
            else:
                own[key] = value


def _narrowed(value: Any, place: Place) -> Any:
    is_split = isinstance(value, torch.Tensor) and value.dim()
    return value.narrow(0, place.at, place.size) if is_split else value
