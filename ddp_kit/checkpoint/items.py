"""An item of a checkpoint: what of it is on this rank, and which rows of it this rank saves."""

from collections.abc import Mapping

import torch

from ddp_kit.checkpoint.format.fit import Kind
from ddp_kit.checkpoint.format.layout import NAMES
from ddp_kit.checkpoint.format.shard import MOST_DIMENSIONS
from ddp_kit.checkpoint.format.sharding import Piece, Shape, cut
from ddp_kit.distributed.local_shard import Fragment, Held, Item, held, is_split, memory_of
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError


def _part(item: Item) -> Held | Fragment:
    """Returns this rank's part of an item."""
    return held(item) if isinstance(item, torch.Tensor) else item


def kind_of_item(name: str, item: Item) -> Kind:
    """Returns the shape and dtype of the whole of an item. Raises: ConfigError if no checkpoint can
    hold it."""
    part = _part(item)
    memory = memory_of(part)
    if memory.dtype not in NAMES or memory.layout != torch.strided:
        raise ConfigError(
            f"{name} is a tensor of {memory.dtype}, {memory.layout}, which a checkpoint cannot "
            f"hold: expected a dense one of {', '.join(sorted(map(str, NAMES)))}."
        )
    if len(part.shape) > MOST_DIMENSIONS:
        raise ConfigError(
            f"{name} has {len(part.shape)} dimensions; a checkpoint holds {MOST_DIMENSIONS} at "
            "most."
        )
    return tuple(part.shape), memory.dtype


def by_who_has_them(
    items: Mapping[str, Item], group: Group
) -> tuple[dict[str, torch.Tensor], dict[str, Held]]:
    """Returns the tensors that every rank has whole, and the rows that are this rank's to save."""
    whole: dict[str, torch.Tensor] = {}
    rows: dict[str, Held] = {}
    fragments: dict[str, Fragment] = {}
    for name, item in items.items():
        if isinstance(item, torch.Tensor) and not is_split(item):
            whole[name] = item
            continue
        part = _part(item)
        if isinstance(part, Held):
            rows[name] = part
        else:
            fragments[name] = part
    return whole, rows | _gathered_rows(fragments, group)


def _gathered_rows(fragments: Mapping[str, Fragment], group: Group) -> dict[str, Held]:
    """Puts tensors that are split anywhere together, one at a time, and keeps in host memory the
    rows that this rank is to write.
    """
    shapes = {
        name: Shape(part.shape, part.content.dtype.itemsize) for name, part in fragments.items()
    }
    own_pieces = cut(shapes, rank=group.rank, world_size=group.world_size)
    pieces = {piece.name: piece for piece in own_pieces}
    found = {}
    for name, part in fragments.items():
        piece = pieces.get(name, Piece(name, 0, 0))
        rows = part.gather()[piece.start : piece.stop].to("cpu", copy=True)
        found[name] = Held(rows, piece.start, part.shape)
    return found
