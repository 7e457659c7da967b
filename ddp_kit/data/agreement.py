"""Whether two readings gave the same samples: of two ranks, or of one rank at two times."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddp_kit.data.transfer import parts_of
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DataError

# Values of a floating-point tensor that are compared.
SPOTS = 64
# Decoding and resizing may round otherwise on another kind of CPU.
TOLERANCE = 1e-3
# Of containers in containers: what moves itself may hold itself.
DEEPEST = 16
EVERYWHERE = (
    "Every rank must have all of the data, of which ddp_kit takes its share: leave out what shares "
    "them out by rank, and draws that are not seeded."
)


def require_same_samples(group: Group, batch: Any, *, what: str, is_iterable: bool) -> None:
    """Compares one fixed batch over ranks. Every rank calls it.

    Whole numbers are compared bit for bit, floating-point ones at some spots.

    Args: `what` data it is, in words, for the error.
    Raises: DataError on every rank that names the first one that reads other samples than rank 0.
    """
    if group.world_size == 1:
        return
    own = json.dumps(_print_of(batch)).encode()
    prints = [json.loads(row) for row in gather_bytes(group, own)]
    for rank, other in enumerate(prints):
        if not _are_alike(prints[0], other):
            raise DataError(_refusal(what, rank=rank, is_iterable=is_iterable))


def require_same_lengths(group: Group, lengths: Mapping[str, int], *, what: str) -> None:
    """Compares the lengths of data sets over ranks. Every rank calls it, with {} too.

    Args: `lengths` by the name of each set ("" for the only one), 0 where a stream does not know;
        `what` data they are, in words.
    Raises: DataError on every rank that names the first one whose data are others than rank 0's.
    """
    rows = gather_bytes(group, json.dumps(list(lengths.items())).encode())
    every = [dict(json.loads(row)) for row in rows]
    first = every[0]
    for rank, other in enumerate(every):
        if list(other) != list(first):
            raise DataError(
                f"the ranks have different {what}: {_names_of(other)} on rank {rank}, "
                f"{_names_of(first)} on rank 0. {EVERYWHERE}"
            )
        for name, length in other.items():
            if length != first[name]:
                raise DataError(
                    f"the {what}{' ' if name else ''}{name} has {length} samples on rank {rank} "
                    f"and {first[name]} on rank 0. {EVERYWHERE}"
                )


def _names_of(lengths: Mapping[str, int]) -> str:
    if not lengths:
        return "none"
    return ", ".join(lengths) or "one set"


def require_same_order(group: Group, order: NDArray[np.int64], *, epoch: int) -> None:
    """Compares an epoch's order over ranks. Every rank calls it.

    Raises: DataError on every rank that names the first one whose order is not rank 0's.
    """
    rows = gather_bytes(group, str(zlib.crc32(order.tobytes())).encode())
    for rank, row in enumerate(rows):
        if row != rows[0]:
            raise DataError(
                f"the order of epoch {epoch} is another one on rank {rank} than on rank 0. "
                "Data.order must be a function of seed, epoch and size alone: leave out what "
                "depends on the rank, and draws that are not seeded."
            )


def require_own_samples(group: Group, batch: Any, *, what: str) -> None:
    """Looks whether streams that are each rank's own begin with other samples. Every rank calls it.

    Args: `batch` the first samples, None if there are none.
    Raises: DataError on every rank that names one without samples, or two with the same.
    """
    own = None if batch is None else _print_of(batch)
    prints = [json.loads(row) for row in gather_bytes(group, json.dumps(own).encode())]
    for rank, found in enumerate(prints):
        if found is None:
            raise DataError(
                f"the {what} is each rank's own (sharded=True), and rank {rank} has no samples."
            )
        for other in range(rank):
            if found and _are_alike(found, prints[other]):
                raise DataError(
                    f"the {what} is said to be each rank's own (sharded=True), and rank {rank} has "
                    f"the same first samples as rank {other}. Leave sharded out of a stream that "
                    "is the same on all ranks: ddp_kit takes each rank's share of it."
                )


def are_same(first: Any, other: Any) -> bool:
    """Whether two batches hold the same samples, as far as `require_same_samples` compares them."""
    return _are_alike(_print_of(first), _print_of(other))


def _refusal(what: str, *, rank: int, is_iterable: bool) -> str:
    said = f"the {what} gives rank {rank} other samples than rank 0 for the same places."
    if is_iterable:
        return (
            f"{said} Every rank must get the whole stream, of which ddp_kit takes its share: "
            "leave out what shares it out by rank "
            "(split_by_node, split_dataset_by_node, [rank::world_size]). Or say that it is each "
            "rank's own, Data(stream, sharded=True): the numbers are then those of this number of "
            "ranks."
        )
    return (
        f"{said} It must hold the same samples on every rank and draw from the default generators "
        "alone, which are keyed by sample: leave out what depends on the rank, and generators of "
        "its own that are not seeded by the sample's index."
    )


def _print_of(batch: Any, *, depth: int = 0) -> list[Any]:
    """Returns what tells a batch's content from another's.

    For each tensor that is its shape and a checksum, or its shape and the values at some spots.
    """
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        batch = torch.from_numpy(np.ascontiguousarray(batch))
    if isinstance(batch, torch.Tensor):
        return [_print_of_tensor(batch.detach().cpu())]
    if isinstance(batch, (str, bytes, int)):
        return [[[], zlib.crc32(repr(batch).encode())]]
    if isinstance(batch, float):
        return [[[], torch.nan_to_num(torch.tensor([batch])).tolist()]]
    found = []
    if depth < DEEPEST:
        for value in parts_of(batch):
            found += _print_of(value, depth=depth + 1)
    return found


def _print_of_tensor(values: torch.Tensor) -> list[Any]:
    if values.is_nested:
        values = torch.cat([part.flatten() for part in values.unbind()])
    if values.layout is not torch.strided:
        values = values.to_dense()
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.is_floating_point():
        flat = values.double().flatten()
        spots = flat[:: max(1, len(flat) // SPOTS)][:SPOTS]
        return [list(values.shape), torch.nan_to_num(spots).tolist()]
    content = values.flatten().contiguous().view(torch.uint8).numpy().tobytes()
    return [list(values.shape), zlib.crc32(content)]


def _are_alike(first: list[Any], other: list[Any]) -> bool:
    if len(first) != len(other):
        return False
    for (shape, content), (others_shape, others_content) in zip(first, other, strict=True):
        if shape != others_shape or not _are_same_content(content, others_content):
            return False
    return True


def _are_same_content(content: list[float] | int, others: list[float] | int) -> bool:
    """Compares two checksums, or two lists of values at the same spots."""
    if not isinstance(content, list) or not isinstance(others, list):
        return content == others
    scale = max((abs(value) for value in content), default=0.0)
    for value, others_value in zip(content, others, strict=True):
        if abs(value - others_value) > TOLERANCE * scale:
            return False
    return True
