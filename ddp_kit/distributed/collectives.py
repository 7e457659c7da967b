"""Agreement between ranks on small values, over the gloo control group.

Owns: every blocking collective of small values, those of a step included. All ranks call each function, in the same order.
Refuses: objects (a peer's bytes are never unpickled), and collectives that some ranks enter only.
In one process without a group each function returns what it was given.
"""

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError


def max_over_ranks(group: Group, values: Sequence[int]) -> list[int]:
    """Returns the element-wise maximum of int64 values. The lengths must be equal on all ranks."""
    if group.control is None:
        return list(values)
    packet = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(packet, dist.ReduceOp.MAX, group=group.control)
    result: list[int] = packet.tolist()
    return result


def first_difference(group: Group, values: Sequence[int]) -> int | None:
    """Returns the index of the first value that is not equal on all ranks, or None."""
    both = max_over_ranks(group, [*values, *(-value for value in values)])
    highest, lowest = both[: len(values)], [-value for value in both[len(values) :]]
    return next(
        (i for i, (high, low) in enumerate(zip(highest, lowest, strict=True)) if high != low), None
    )


def sum_over_ranks(group: Group, values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a CPU tensor over all ranks; it is also changed in place."""
    if group.control is not None:
        dist.all_reduce(values, group=group.control)
    return values


def sum_by_name(
    group: Group, rows: torch.Tensor, *, names: Sequence[str], order: Sequence[int]
) -> dict[str, list[float]]:
    """Adds up rows (k, len(names), values) of all ranks in float64, in an order that does not depend on who has which.

    Args: `order` one number for each row, by which the rows of all ranks are sorted.
    Raises: DdpKitError on every rank if the names differ between ranks.
    """
    if first_difference(group, [zlib.crc32("\n".join(names).encode())]) is not None:
        raise DdpKitError(
            f"the ranks report different metrics; rank {group.rank} has {', '.join(names)}."
        )
    at = torch.argsort(torch.cat(gather_rows(group, torch.tensor(order, dtype=torch.int64))))
    sums = torch.cat(gather_rows(group, rows.cpu()))[at].sum(0)  # host-device synchronisation
    return dict(zip(names, sums.tolist(), strict=True))


def from_rank(group: Group, data: bytes, *, source: int = 0) -> bytes:
    """Returns the bytes that `source` gave; what the other ranks give is ignored."""
    if group.control is None:
        return data
    size = torch.tensor([len(data)], dtype=torch.int64)
    dist.broadcast(size, source, group=group.control)
    content = torch.zeros(int(size), dtype=torch.uint8)
    if group.rank == source:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else content
    dist.broadcast(content, source, group=group.control)
    return bytes(content.numpy().tobytes())


def gather_bytes(group: Group, data: bytes) -> list[bytes]:
    """Returns every rank's bytes, in rank order."""
    if group.control is None:
        return [data]
    sizes = max_over_ranks(
        group, [len(data) if rank == group.rank else 0 for rank in range(group.world_size)]
    )
    own = torch.zeros(max(max(sizes), 1), dtype=torch.uint8)
    if data:
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(group.world_size)]
    dist.all_gather(every, own, group=group.control)
    return [
        bytes(content.numpy().tobytes()[:size]) for content, size in zip(every, sizes, strict=True)
    ]


def gather_rows(group: Group, rows: torch.Tensor) -> list[torch.Tensor]:
    """Returns every rank's rows (n_rank, ...) in rank order. The number of rows may differ; dtype and trailing shape may not."""
    if group.control is None:
        return [rows]
    counts = max_over_ranks(
        group, [len(rows) if rank == group.rank else 0 for rank in range(group.world_size)]
    )
    own = torch.zeros((max(counts), *rows.shape[1:]), dtype=rows.dtype)
    own[: len(rows)] = rows
    every = [torch.empty_like(own) for _ in range(group.world_size)]
    dist.all_gather(every, own, group=group.control)
    return [content[:count] for content, count in zip(every, counts, strict=True)]


def over_shards(norm: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Returns the Euclidean norm over the parts of all ranks, given that of this rank's; None: the ranks hold no parts."""
    if group is None:
        return norm
    square = norm.double().square()
    dist.all_reduce(square, group=group)
    return square.sqrt().to(norm.dtype)


def anywhere(found: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sets a flag on all ranks if it is set on one that holds a part; None: the ranks hold no parts, and know it already."""
    if group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
