"""Agreement between ranks on small values, over the gloo control group.

All ranks call each function, in the same order. What travels is numbers and bytes: a peer's bytes
are never unpickled. In one process without a group each function returns what it was given.
"""

import zlib
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError


def max_over_ranks(group: Group, values: Sequence[int]) -> list[int]:
    """Returns the element-wise maximum of int64 values. The lengths must be equal on all ranks."""
    if group.control_pg is None:
        return list(values)
    packet = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(packet, dist.ReduceOp.MAX, group=group.control_pg)
    result: list[int] = packet.tolist()
    return result


def await_all(group: Group, what: str, *, within_s: float) -> None:
    """Returns once every rank has called it, which each does when it has done with `what`.

    Raises: DdpKitError with the ranks that have not in that time; what torch raises if one is gone.
    """
    if group.control_pg is None:
        return
    group.failure_report.note(what)
    work = dist.all_reduce(torch.zeros(1), group=group.control_pg, async_op=True)
    assert work is not None
    try:
        work.wait(timedelta(seconds=within_s))
    except RuntimeError as error:
        late = group.failure_report.without(what)
        if "timed out" not in str(error).lower() or not late:
            raise
        ranks = ", ".join(map(str, late))
        raise DdpKitError(
            f"rank {ranks} has not come out of {what} within {within_s:.0f} s."
        ) from error


def first_difference(group: Group, values: Sequence[int]) -> int | None:
    """Returns the index of the first value that is not equal on all ranks, or None."""
    # The smallest one is the negative of the largest negative.
    negatives = [-value for value in values]
    both = max_over_ranks(group, [*values, *negatives])
    highest = both[: len(values)]
    lowest = both[len(values) :]
    for index, (high, negative_low) in enumerate(zip(highest, lowest, strict=True)):
        if high != -negative_low:
            return index
    return None


def same_everywhere(group: Group, texts: Iterable[str]) -> bool:
    """Whether all ranks have the same names, or other texts, in the same order."""
    return first_difference(group, [zlib.crc32("\n".join(texts).encode())]) is None


def sum_over_ranks(group: Group, values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a CPU tensor over all ranks; it is also changed in place."""
    if group.control_pg is not None:
        dist.all_reduce(values, group=group.control_pg)
    return values


def sum_by_name(
    group: Group, rows: torch.Tensor, *, names: Sequence[str], order: Sequence[int]
) -> dict[str, list[float]]:
    """Adds up rows of all ranks in float64, in an order that does not depend on who has which.

    Args: `rows` (k, len(names), values) of this rank; `order` one number for each of its rows, by
        which the rows of all ranks are sorted.
    Returns: the sums of each name's values, after a host-device synchronisation.
    Raises: DdpKitError on every rank if the names differ between ranks.
    """
    if not same_everywhere(group, names):
        raise DdpKitError(
            f"the ranks report different metrics; rank {group.rank} has {', '.join(names)}."
        )
    numbers = torch.cat(gather_rows(group, torch.tensor(order, dtype=torch.int64)))
    every_row = torch.cat(gather_rows(group, rows.cpu()))
    sums = every_row[torch.argsort(numbers)].sum(0)
    return dict(zip(names, sums.tolist(), strict=True))


def from_rank(group: Group, data: bytes, *, source: int = 0) -> bytes:
    """Returns the bytes that `source` gave; what the other ranks give is ignored."""
    if group.control_pg is None:
        return data
    size = torch.tensor([len(data)], dtype=torch.int64)
    dist.broadcast(size, source, group=group.control_pg)
    content = torch.zeros(int(size), dtype=torch.uint8)
    if data and group.rank == source:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(content, source, group=group.control_pg)
    return bytes(content.numpy().tobytes())


def short_from_rank_0(group: Group, data: bytes, *, room: int = 504) -> bytes:
    """Returns the bytes that rank 0 gave, as `from_rank` does: in one message if they have room."""
    if group.control_pg is None:
        return data
    message = bytearray(8 + room)
    if group.rank == 0:
        message[:8] = len(data).to_bytes(8, "little")
        if len(data) <= room:
            message[8 : 8 + len(data)] = data
    content = torch.frombuffer(message, dtype=torch.uint8)
    dist.broadcast(content, 0, group=group.control_pg)
    size = int.from_bytes(message[:8], "little")
    if size > room:
        return from_rank(group, data)
    return bytes(message[8 : 8 + size])


def gather_bytes(group: Group, data: bytes) -> list[bytes]:
    """Returns every rank's bytes, in rank order."""
    if group.control_pg is None:
        return [data]
    sizes = _of_each_rank(group, len(data))
    own = torch.zeros(max(max(sizes), 1), dtype=torch.uint8)
    if data:
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(group.world_size)]
    dist.all_gather(every, own, group=group.control_pg)
    found = []
    for content, size in zip(every, sizes, strict=True):
        found.append(bytes(content.numpy().tobytes()[:size]))
    return found


def gather_rows(group: Group, rows: torch.Tensor) -> list[torch.Tensor]:
    """Returns every rank's rows (n_rank, ...) in rank order.

    The number of rows may differ; dtype and trailing shape may not.
    """
    if group.control_pg is None:
        return [rows]
    counts = _of_each_rank(group, len(rows))
    own = torch.zeros((max(counts), *rows.shape[1:]), dtype=rows.dtype)
    own[: len(rows)] = rows
    every = [torch.empty_like(own) for _ in range(group.world_size)]
    # As bytes: gloo does not know all dtypes.
    received = [content.view(torch.uint8) for content in every]
    dist.all_gather(received, own.view(torch.uint8), group=group.control_pg)
    return [content[:count] for content, count in zip(every, counts, strict=True)]


def _of_each_rank(group: Group, number: int) -> list[int]:
    """Returns every rank's number, 0 or more, in rank order."""
    numbers = [0] * group.world_size
    numbers[group.rank] = number
    return max_over_ranks(group, numbers)


def over_shards(norm: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Returns the Euclidean norm over the parts of all ranks.

    Args: `norm` that of this rank's parts, a scalar; `group` of those who hold parts, None: the
        ranks hold no parts.
    """
    if group is None:
        return norm
    square = norm.double().square()
    dist.all_reduce(square, group=group)
    return square.sqrt().to(norm.dtype)


def anywhere(found: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sets a flag on all ranks if it is set on one that holds a part.

    Args: `found` the flag, changed in place; `group` of those who hold parts, None: the ranks hold
        no parts, and know it already.
    """
    if group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
