"""Tensors of which each rank holds a part: FSDP2's, split by rows.

Owns: what of a named tensor is here, as plain memory, and gathering one of them whole.
Refuses: knowing strategies. A tensor says itself how it is split; a plain one is whole on every rank.
"""

from dataclasses import dataclass

import torch

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


def is_split(tensor: torch.Tensor) -> bool:
    """Whether ranks hold parts of a tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a tensor, without a copy and without gradients; a plain tensor is its own part."""
    detached = tensor.detach()
    part: torch.Tensor = detached.to_local() if is_split(detached) else detached  # type: ignore[attr-defined]  # a DTensor, whose import takes a second
    return part


def held(tensor: torch.Tensor, content: torch.Tensor | None = None) -> Held:
    """Returns this rank's rows of a tensor; `content`: those of another one (an average, a moment) that is split alike."""
    rows = local(tensor) if content is None else content
    if not is_split(tensor):
        return Held(rows, 0, tuple(tensor.shape))
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None  # every rank is in the mesh
    if not all(isinstance(at, Replicate) or at.is_shard(0) for at in tensor.placements):
        raise ConfigError(f"a tensor of shape {tuple(tensor.shape)} is split as {tensor.placements}; a checkpoint takes rows: Shard(0).")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    is_first = all(at == 0 for at, placement in zip(place, tensor.placements, strict=True) if isinstance(placement, Replicate))
    return Held(rows, offset[0] if offset else 0, tuple(tensor.shape), writes=is_first)


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor. Every rank that holds a part calls it, tensor by tensor in the same order."""
    detached = tensor.detach()
    full: torch.Tensor = detached.full_tensor() if is_split(detached) else detached  # type: ignore[attr-defined]  # a DTensor
    return full
