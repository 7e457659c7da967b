"""Rows of an evaluation: those of all ranks, in the order of the samples."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ddp_kit.distributed.collectives import gather_bytes, gather_rows, same_everywhere
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DataError, DdpKitError, some

Kind = tuple[str, tuple[int, ...]]  # dtype and shape of a row


def in_sample_order(
    group: Group,
    rows: Mapping[str, Sequence[torch.Tensor]],
    indices: Sequence[np.ndarray[Any, Any]],
) -> dict[str, torch.Tensor]:
    """Returns the rows of all ranks, sorted by sample index. Every rank calls it.

    Args: `rows` of each name, those of this rank's micro-batches; `indices` their samples.
    Raises:
        DdpKitError: ranks have rows of different names.
        DataError: rows of one name differ in shape or dtype, or are missing; on all ranks alike.
    """
    names = sorted(rows)
    if not same_everywhere(group, names):
        raise DdpKitError(
            "the ranks' `evaluate` returned rows under different names; "
            f"rank {group.rank} has {', '.join(names)}."
        )
    kinds = _agreed_kinds(group, rows, size=sum(len(own) for own in indices))
    own = torch.empty(0, dtype=torch.int64)
    if indices:
        own = torch.from_numpy(np.concatenate(indices))
    order = torch.argsort(torch.cat(gather_rows(group, own)))
    found = {}
    for name in names:
        dtype, shape = kinds[name]
        # A rank may have had none but padding.
        none = torch.empty((0, *shape), dtype=getattr(torch, dtype))
        whole = torch.cat([none, *rows[name]])
        found[name] = torch.cat(gather_rows(group, whole))[order]
    return found


def _agreed_kinds(
    group: Group, rows: Mapping[str, Sequence[torch.Tensor]], *, size: int
) -> dict[str, Kind]:
    """Returns dtype and shape of each name's rows, which are those of all ranks.

    Raises: DataError on every rank if they are not, or `size` rows are not there.
    """
    own = {}
    for name, parts in rows.items():
        kinds = sorted({_kind_of(part) for part in parts})
        own[name] = {"kinds": kinds, "missing": size - sum(len(part) for part in parts)}
    every = [json.loads(content) for content in gather_bytes(group, json.dumps(own).encode())]
    agreed = {}
    for name in sorted(rows):
        seen: dict[Kind, int] = {}
        for rank, of_rank in enumerate(every):
            if of_rank[name]["missing"]:
                raise DataError(
                    f"evaluate: {of_rank[name]['missing']} samples of rank {rank} have no row of "
                    f"{name!r}; expected one each, in every micro-batch."
                )
            for dtype, shape in of_rank[name]["kinds"]:
                seen.setdefault((dtype, tuple(shape)), rank)
        if len(seen) > 1:
            raise DataError(
                f"evaluate: rows of {name!r} differ: {_listed(seen)}; expected one dtype and "
                "shape for all samples. Pad them to one length, or return sums with counts."
            )
        agreed[name] = next(iter(seen), ("float32", ()))
    return agreed


def _kind_of(rows: torch.Tensor) -> Kind:
    return str(rows.dtype).removeprefix("torch."), tuple(rows.shape[1:])


def _listed(seen: Mapping[Kind, int]) -> str:
    """Returns the kinds, each with the first rank that has it."""
    return some(
        [f"{dtype} of shape {shape} on rank {rank}" for (dtype, shape), rank in seen.items()]
    )
