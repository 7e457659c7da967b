"""Tensors of which each rank holds a part: FSDP2's, split by rows, and DeepSpeed's, split anywhere.

Owns: what of a named tensor is here, as plain memory, and gathering one of them whole.
Refuses: knowing strategies. A tensor says itself how it is split; a plain one is whole on every rank.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddp_kit.errors import ConfigError


@dataclass(frozen=True)
class Held:
    """Rows `start` and following of a tensor of `shape`, in this rank's memory. `writes`: this rank is the one that saves them."""

    rows: torch.Tensor
    start: int
    shape: tuple[int, ...]
    writes: bool = True

    @property
    def stop(self) -> int:
        """The row after the last one; a scalar is one row."""
        return self.start + (len(self.rows) if self.shape else 1)


@dataclass(frozen=True)
class Fragment:
    """Elements `start` and following of a flattened tensor of `shape`, in this rank's memory; the ranks of `group` have all of them."""

    content: torch.Tensor
    start: int
    shape: tuple[int, ...]
    group: dist.ProcessGroup

    @torch.no_grad()
    def gather(self) -> torch.Tensor:
        """Returns the whole tensor. Every rank of the group calls it."""
        tensor = self.content.new_zeros(math.prod(self.shape))
        tensor[self.start : self.start + len(self.content)] = self.content
        dist.all_reduce(
            tensor.view(torch.uint8), group=self.group
        )  # as bytes, of which all ranks but one have 0: -0.0 stays what it is
        return tensor.view(self.shape)

    def rows(self) -> Held:
        """Returns new host memory for the rows in which the elements are."""
        size = math.prod(self.shape[1:])
        first, last = (
            (self.start // size, -(-(self.start + len(self.content)) // size))
            if len(self.content)
            else (0, 0)
        )
        return Held(
            torch.empty((last - first, *self.shape[1:]), dtype=self.content.dtype),
            first,
            self.shape,
        )

    @torch.no_grad()
    def take(self, held: Held) -> None:
        """Copies the elements out of rows."""
        start = self.start - held.start * math.prod(self.shape[1:])
        self.content.copy_(held.rows.reshape(-1)[start : start + len(self.content)])


def is_split(tensor: torch.Tensor) -> bool:
    """Whether ranks hold parts of a tensor."""
    return hasattr(tensor, "to_local") or hasattr(tensor, "ds_tensor")


def size(tensor: torch.Tensor) -> int:
    """Returns how many elements a tensor has on all ranks together."""
    return int(
        getattr(tensor, "ds_numel", tensor.numel())
    )  # one of DeepSpeed's stage 3 is empty itself


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a tensor, without a copy and without gradients; a plain tensor is its own part."""
    detached = getattr(tensor, "ds_tensor", tensor).detach()
    part: torch.Tensor = (
        detached.to_local() if hasattr(detached, "to_local") else detached
    )  # a DTensor, whose import takes a second
    return part


def held(tensor: torch.Tensor, content: torch.Tensor | None = None) -> Held | Fragment:
    """Returns this rank's part of a tensor; `content`: that of another one (an average, a moment) that is split alike."""
    rows = local(tensor) if content is None else content
    if not is_split(tensor):
        return Held(rows, 0, tuple(tensor.shape))
    if hasattr(tensor, "ds_tensor"):
        return _fragment(tensor, rows)
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None  # every rank is in the mesh
    if not all(isinstance(at, Replicate) or at.is_shard(0) for at in tensor.placements):
        raise ConfigError(
            f"a tensor of shape {tuple(tensor.shape)} is split as {tensor.placements}; a checkpoint takes rows: Shard(0)."
        )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    is_first = all(
        at == 0
        for at, placement in zip(place, tensor.placements, strict=True)
        if isinstance(placement, Replicate)
    )
    return Held(rows, offset[0] if offset else 0, tuple(tensor.shape), writes=is_first)


def _fragment(tensor: Any, content: torch.Tensor) -> Fragment:
    """A parameter of DeepSpeed's stage 3, which is empty itself; what follows the last of its elements is padding."""
    start = min(dist.get_rank(tensor.ds_process_group) * len(content), tensor.ds_numel)
    size = min(len(content), tensor.ds_numel - start)
    return Fragment(content[:size], start, tuple(tensor.ds_shape), tensor.ds_process_group)


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor. Every rank that holds a part calls it, tensor by tensor in the same order."""
    part = held(tensor) if hasattr(tensor, "ds_tensor") else None
    if isinstance(part, Fragment):
        return part.gather()
    detached: Any = tensor.detach()
    if not is_split(detached):
        return tensor.detach()
    full: torch.Tensor = detached.to(
        detached.device_mesh.device_type
    ).full_tensor()  # one in host memory is where NCCL does not reach
    return full
