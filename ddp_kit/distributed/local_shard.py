"""Tensors of which each rank holds a part: FSDP2's, split by rows, and DeepSpeed's, anywhere.

What of a tensor is here is given as plain memory. A tensor says itself how it is split, so that no
strategy has to be known; a plain one is whole on every rank.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddp_kit.errors import ConfigError


@dataclass(frozen=True)
class Held:
    """Rows `start` and following of a tensor of `shape`, in this rank's memory."""

    rows: torch.Tensor
    start: int
    shape: tuple[int, ...]
    writes: bool = True  # this rank is the one that saves them

    @property
    def stop(self) -> int:
        """The row after the last one; a scalar is one row."""
        return self.start + (len(self.rows) if self.shape else 1)


@dataclass(frozen=True)
class Fragment:
    """Elements `start` and following of a flattened tensor of `shape`, in this rank's memory.

    The ranks of `group` have all of them.
    """

    content: torch.Tensor
    start: int
    shape: tuple[int, ...]
    group: dist.ProcessGroup

    @torch.no_grad()
    def gather(self) -> torch.Tensor:
        """Returns the whole tensor. Every rank of the group calls it."""
        tensor = self.content.new_zeros(math.prod(self.shape))
        tensor[self.start : self.start + len(self.content)] = self.content
        # As bytes, of which all ranks but one have 0: -0.0 stays what it is.
        dist.all_reduce(tensor.view(torch.uint8), group=self.group)
        return tensor.view(self.shape)

    def rows(self) -> Held:
        """Returns new host memory for the rows in which the elements are."""
        size = math.prod(self.shape[1:])
        first = 0
        last = 0
        if len(self.content):
            first = self.start // size
            last = -(-(self.start + len(self.content)) // size)  # rounded up
        memory = torch.empty((last - first, *self.shape[1:]), dtype=self.content.dtype)
        return Held(memory, first, self.shape)

    @torch.no_grad()
    def take(self, held: Held) -> None:
        """Copies the elements out of rows."""
        start = self.start - held.start * math.prod(self.shape[1:])
        self.content.copy_(held.rows.reshape(-1)[start : start + len(self.content)])


Item = torch.Tensor | Held | Fragment  # a tensor, which says itself what of it is here, or a part


def memory_of(item: Item) -> torch.Tensor:
    """Returns the tensor, or the memory of a part."""
    if isinstance(item, Held):
        return item.rows
    if isinstance(item, Fragment):
        return item.content
    return item


def is_split(tensor: torch.Tensor) -> bool:
    """Whether ranks hold parts of a tensor."""
    return hasattr(tensor, "to_local") or hasattr(tensor, "ds_tensor")


def size(tensor: torch.Tensor) -> int:
    """Returns how many elements a tensor has on all ranks together."""
    # One of DeepSpeed's stage 3 is empty itself.
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a tensor, without a copy and without gradients.

    A plain tensor is its own part.
    """
    part: torch.Tensor = getattr(tensor, "ds_tensor", tensor).detach()
    # A DTensor has it; importing that class takes a second.
    if hasattr(part, "to_local"):
        part = part.to_local()
    return part


def held(tensor: torch.Tensor, content: torch.Tensor | None = None) -> Held | Fragment:
    """Returns this rank's part of a tensor.

    Args: `content` the part of another tensor (an average, optimizer state) that is split alike;
        None: the tensor's own.
    Raises: ConfigError if it is split in another way than by rows.
    """
    rows = local(tensor) if content is None else content
    if not is_split(tensor):
        return Held(rows, 0, tuple(tensor.shape))
    if hasattr(tensor, "ds_tensor"):
        return _fragment(tensor, rows)
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    assert place is not None  # every rank is in the mesh
    if not all(isinstance(at, Replicate) or at.is_shard(0) for at in tensor.placements):
        raise ConfigError(
            f"a tensor of shape {tuple(tensor.shape)} is split as {tensor.placements};"
            " a checkpoint takes rows: Shard(0)."
        )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    # Of the ranks that hold the same rows, the first one saves them.
    writes = True
    for at, placement in zip(place, tensor.placements, strict=True):
        if isinstance(placement, Replicate) and at != 0:
            writes = False
    return Held(rows, offset[0] if offset else 0, tuple(tensor.shape), writes=writes)


def _fragment(tensor: Any, content: torch.Tensor) -> Fragment:
    """Returns the part of a parameter of DeepSpeed's stage 3, which is empty itself.

    What follows the last of its elements is padding.
    """
    start = min(dist.get_rank(tensor.ds_process_group) * len(content), tensor.ds_numel)
    size = min(len(content), tensor.ds_numel - start)
    return Fragment(content[:size], start, tuple(tensor.ds_shape), tensor.ds_process_group)


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor.

    Every rank that holds a part calls it, tensor by tensor in the same order.
    """
    part = held(tensor) if hasattr(tensor, "ds_tensor") else None
    if isinstance(part, Fragment):
        return part.gather()
    detached: Any = tensor.detach()
    if not is_split(detached):
        return tensor.detach()
    # One in host memory is where NCCL does not reach.
    on_device = detached.to(detached.device_mesh.device_type)
    full: torch.Tensor = on_device.full_tensor()
    return full
