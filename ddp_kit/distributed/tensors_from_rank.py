"""Several tensors of rank 0 to all ranks in one message: as bytes, since gloo knows few dtypes."""

import ctypes
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ddp_kit.distributed.collectives import from_rank
from ddp_kit.distributed.process_group import Group

# Bytes between the beginnings of two tensors are a multiple of it, whatever their dtypes.
ALIGNED = 16
Kind = tuple[tuple[int, ...], torch.dtype] | None  # None: there is no tensor


def kind_of(tensor: torch.Tensor | None) -> Kind:
    """Returns a tensor's shape and dtype."""
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's bytes, flat; a view where the memory allows one."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def view_of(content: torch.Tensor) -> memoryview:
    """Returns the memory of flat bytes in host memory, for as long as the tensor lives.

    A tensor that NumPy has looked at cannot be resized any more, which observers of quantisation
    do.
    """
    if not len(content):
        return memoryview(b"")
    kind = ctypes.c_ubyte * len(content)
    return memoryview(kind.from_address(content.data_ptr()))


def tensors_from_rank_0(
    group: Group, own: Sequence[torch.Tensor | None], *, usual: Sequence[Kind]
) -> list[torch.Tensor | None]:
    """Returns rank 0's tensors. Every rank calls it.

    Args: `usual` the kinds that all ranks expect; others of rank 0's take another message.
    """
    if group.sums_pg is None or not own:
        return list(own)
    kinds = list(usual)
    own_kinds = [kind_of(tensor) for tensor in own]
    is_usual = own_kinds == kinds
    message = _empty(kinds, device=group.device)
    if group.rank == 0 and is_usual:
        _fill(message, own)
    if group.rank == 0:
        message[0] = int(is_usual)
    dist.broadcast(message, 0, group=group.sums_pg)
    # Host-device synchronisation.
    if not bool(message[0]):
        kinds = _read(from_rank(group, _text(own_kinds)))
        message = _empty(kinds, device=group.device)
        if group.rank == 0:
            _fill(message, own)
        dist.broadcast(message, 0, group=group.sums_pg)
    return _tensors_in(message, kinds)


def _size(kind: Kind) -> int:
    """Returns the bytes that a tensor takes in a message."""
    if kind is None:
        return 0
    shape, dtype = kind
    size = torch.Size(shape).numel() * dtype.itemsize
    return -(-size // ALIGNED) * ALIGNED


def _empty(kinds: Sequence[Kind], *, device: torch.device) -> torch.Tensor:
    """Returns the memory of a message: a head, then the tensors."""
    size = ALIGNED + sum(_size(kind) for kind in kinds)
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _fill(message: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> None:
    at = ALIGNED
    for tensor in tensors:
        if tensor is not None:
            content = as_bytes(tensor)
            message[at : at + len(content)] = content
        at += _size(kind_of(tensor))


def _tensors_in(message: torch.Tensor, kinds: Sequence[Kind]) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    at = ALIGNED
    for kind in kinds:
        if kind is None:
            found.append(None)
            continue
        shape, dtype = kind
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(message[at : at + size].view(dtype).view(shape))
        at += _size(kind)
    return found


def _text(kinds: Sequence[Kind]) -> bytes:
    rows: list[list[object] | None] = []
    for kind in kinds:
        if kind is None:
            rows.append(None)
        else:
            shape, dtype = kind
            rows.append([list(shape), str(dtype).removeprefix("torch.")])
    return json.dumps(rows).encode()


def _read(text: bytes) -> list[Kind]:
    return [_kind_in(row) for row in json.loads(text)]


def _kind_in(row: Any) -> Kind:
    if row is None:
        return None
    shape, dtype = row
    return tuple(shape), getattr(torch, dtype)
